"""`soma`: the commands around a server."""

from __future__ import annotations

import typer

from soma_vllm.cli import adapters, keys, models, sessions
from soma_vllm.cli.calibrate import calibrate
from soma_vllm.cli.calibrate_router import calibrate_router
from soma_vllm.cli.distill import distill
from soma_vllm.cli.evaluate import evaluate
from soma_vllm.cli.replay import replay
from soma_vllm.cli.serve import Version

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(models.app, name="models", help="Fetch, list and make models.")
app.add_typer(keys.app, name="keys", help="Issue, list and revoke API keys.")
app.add_typer(adapters.app, name="adapters", help="Look at the adapter store, verify it and clear it.")
app.add_typer(sessions.app, name="sessions", help="Look at a running server's sessions, and order them about.")


@app.callback()
def soma(version: Version = False) -> None:
    """The commands around a soma-serve."""


app.command()(replay)
app.command()(calibrate)
app.command()(calibrate_router)
app.command()(evaluate)
app.command()(distill)


if __name__ == "__main__":
    app()
