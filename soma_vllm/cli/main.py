"""`soma`: the commands around a server."""

from __future__ import annotations

import os

import typer

from soma_vllm.app.serve import Version
from soma_vllm.cli import adapters, keys, models, sessions, storage
from soma_vllm.private import PRIVATE_UMASK
from soma_vllm.tools.calibrate.calibrate import calibrate, calibrate_router
from soma_vllm.tools.distill import distill
from soma_vllm.tools.evaluate.evaluate import evaluate
from soma_vllm.tools.gap_command import gap
from soma_vllm.tools.replay.replay import replay

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(models.app, name="models", help="Fetch, list and make models.")
app.add_typer(keys.app, name="keys", help="Issue, list and revoke API keys.")
app.add_typer(adapters.app, name="adapters", help="List, verify, pin and delete adapters.")
app.add_typer(sessions.app, name="sessions", help="Inspect and control the sessions of a running server.")
app.add_typer(storage.app, name="storage", help="Migrate a session store, or make a copied one its own.")


@app.callback()
def soma(context: typer.Context, version: Version = False) -> None:
    """The commands around a soma-serve."""
    if context.invoked_subcommand != "models":  # those are no secret, and may serve several users
        os.umask(PRIVATE_UMASK)


app.command()(replay)
app.command()(calibrate)
app.command()(calibrate_router)
app.command()(evaluate)
app.command()(distill)
app.command()(gap)


if __name__ == "__main__":
    app()
