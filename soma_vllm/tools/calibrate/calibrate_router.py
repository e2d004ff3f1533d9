"""`soma calibrate-router`: the threshold at which `routellm` gives the original a wanted share of queries.

Scores queries that were logged, or your own, with the configured router, as `routellm.calibrate_threshold` does
with public ones. Nothing is written but numbers, to the terminal.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from soma_vllm.config import Config, load_config
from soma_vllm.errors import ConfigError, SomaError
from soma_vllm.sessions.state.transcript import text_of
from soma_vllm.tools.replay.dialogues import Dialogues, load_dialogues

AT_ONCE = 32
"""Queries scored per request: each has `baselines.timeout_s`."""


def calibrate_router(
    config: Annotated[Path, typer.Option(help="Configuration: baselines.routellm's router and checkpoint.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of queries for the original.")] = 0.5,
    dialogues: Annotated[
        Path | None, typer.Option(help='Queries: a dialogue file, {"id": ["user turn 1", ...]}.')
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="Queries: those logged in this database (SQLAlchemy URL).")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="Most queries to score, of the latest sessions.")] = 1000,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the configuration; repeatable.")
    ] = None,
) -> None:
    """Print a value for `baselines.routellm.threshold`.

    Exits with 1 when nothing can be scored, with 2 on wrong input.
    """
    try:
        resolved = load_config(config, overrides or [])
        if (dialogues is None) == (storage is None):
            found = "neither" if dialogues is None else "both"
            raise ConfigError("options", [f"found {found} of --dialogues and --storage; expected one"])
        script = None if dialogues is None else load_dialogues(dialogues)
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from None
    try:
        asyncio.run(_calibrate(resolved, share, script, storage, most))
    except SomaError as error:
        typer.echo(f"soma calibrate-router: {error}", err=True)
        raise typer.Exit(1) from None


async def _calibrate(
    config: Config, share: float, script: Dialogues | None, storage: str | None, most: int
) -> None:
    # Imported late: a wrong option is told in milliseconds.
    from soma_vllm.baselines.policies.routellm import Router, threshold_for

    if script is not None:
        queries = [query for turns in script.values() for query in turns][:most]
    else:
        assert storage is not None, "calibrate_router has checked"
        queries = await _logged(storage, most)
    if not queries:
        raise ConfigError("queries", ["found none whose text was kept; expected at least one"])
    router = Router(config)
    try:
        await router.start()
        scores: list[float] = []
        for start in range(0, len(queries), AT_ONCE):
            scores += await router.scores(queries[start : start + AT_ONCE])
    finally:
        await router.close()
    threshold = threshold_for(scores, share)
    reached = sum(score >= threshold for score in scores) / len(scores)
    typer.echo(f"scored     {len(scores)} queries: win rates {min(scores):.4f} to {max(scores):.4f}")
    typer.echo(f"share      {reached:.3f} of them for the original, {share:g} wanted")
    typer.echo(f"baselines.routellm.threshold: {threshold!r}")


async def _logged(storage: str, most: int) -> list[str]:
    """Queries of the latest sessions on record."""
    from soma_vllm.models.home import soma_home
    from soma_vllm.sessions.sql.store import reading

    queries: list[str] = []
    async with reading(storage.format(soma_home=soma_home())) as store:
        for summary in await store.summaries(None, most):
            for event in await store.events(summary.key):
                messages = (event.text or {}).get("messages") if event.kind == "turn" else None
                if messages and messages[-1].get("role") == "user":
                    queries.append(text_of(messages[-1]))
            if len(queries) >= most:
                break
    return queries[:most]
