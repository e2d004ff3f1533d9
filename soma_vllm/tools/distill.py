"""`soma distill`: one adapter from many sessions of one tenant, for that tenant's sessions to start from.

Guarantees: every mistake is reported before anything is loaded; sessions of two tenants are never pooled; the
output directory is written whole or not at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from soma_vllm.config import Config, load_config
from soma_vllm.errors import ConfigError, SomaError, TrainingError
from soma_vllm.machine import training_dtype
from soma_vllm.sessions.state.fold import restore
from soma_vllm.sessions.state.session import Session
from soma_vllm.tools.evaluate.dataset import Material, material, of_session, split_short
from soma_vllm.tools.evaluate.original_answers import played_for
from soma_vllm.tools.replay.dialogues import Dialogues, load_dialogues
from soma_vllm.training.pair import ANYONE


def distill(
    config: Annotated[Path, typer.Option(help="Configuration: the pair, the prefix, the training.")],
    out: Annotated[Path, typer.Option(help="New directory for the adapter; name it as lora.init_from.")],
    dialogues: Annotated[
        Path | None,
        typer.Option(help='Your own dialogues, {"id": ["user turn 1", ...]}, played to the original.'),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Pool this tenant's logged sessions; `public` without API keys.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option(help="SQLAlchemy URL of the session log; default: the configuration's.")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Most sessions to pool, the latest first.")] = 64,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="key=value over the configuration; repeatable.")
    ] = None,
) -> None:
    """Train an adapter once, offline, on pooled sessions: from a dialogue file, or one tenant's log.

    It starts only sessions of that tenant (those of any tenant, when made from your own dialogue file). Exits
    with 1 when nothing can be trained, with 2 on wrong input.
    """
    resolved, script = _prepared(config, dialogues, tenant, overrides or [])
    try:
        if script is not None:
            found, owner = _from_dialogues(resolved, script), ANYONE
        else:
            assert tenant is not None, "_prepared has checked"
            found, owner = _from_log(resolved, tenant, storage, sessions), tenant
        _train(resolved, found, owner, out)
    except SomaError as error:
        typer.echo(f"soma distill: {error}", err=True)
        raise typer.Exit(1) from None


def _prepared(
    path: Path, dialogues: Path | None, tenant: str | None, overrides: Sequence[str]
) -> tuple[Config, Dialogues | None]:
    """Read everything, or exit with 2 after printing all that is wrong."""
    problems: list[str] = []
    config, script = None, None
    if (dialogues is None) == (tenant is None):
        found = "neither" if dialogues is None else "both"
        problems.append(f"found {found} of --dialogues and --tenant; expected one: what is to be pooled")
    try:
        config = load_config(path, overrides).for_serving(str(path))
    except ConfigError as error:
        problems.append(str(error))
    try:
        script = None if dialogues is None else load_dialogues(dialogues)
    except ConfigError as error:
        problems.append(str(error))
    if config is not None and script is not None:
        script, short = split_short(script, config)
        if not script:
            problems.append(str(ConfigError(str(dialogues), short)))
    if problems or config is None:
        typer.echo("\n".join(problems), err=True)
        raise typer.Exit(2)
    return config, script


def _from_dialogues(config: Config, script: Dialogues) -> list[Material]:
    """Sessions of the operator's own, played to the original once and remembered."""
    played = asyncio.run(played_for(config, script, config.original.max_num_seqs, typer.echo))
    return [material(trajectory, config) for trajectory in played.values()]


def _from_log(config: Config, tenant: str, storage: str | None, most: int) -> list[Material]:
    """One tenant's sessions as they were logged.

    Raises:
        TrainingError: it has none with a complete warm start.
    """
    restored = asyncio.run(_restored(config, tenant, storage, most))
    found = [session for session in (of_session(logged, config) for logged in restored) if session is not None]
    if not found:
        raise TrainingError(
            f"tenant {tenant!r}: found {len(restored)} logged sessions, none with {config.warm_window} turns "
            "of the original to learn from"
        )
    return found


async def _restored(config: Config, tenant: str, storage: str | None, most: int) -> list[Session]:
    """The tenant's latest sessions, folded from their events."""
    from soma_vllm.models.home import soma_home
    from soma_vllm.sessions.sql.store import reading

    url = storage or config.storage.url
    if "{run_dir}" in url:
        raise TrainingError(
            f"storage.url: found {url!r}, which names a running server's folder; give --storage"
        )
    async with reading(url.format(soma_home=soma_home())) as store:
        keys = [found.key for found in await store.summaries(tenant, most)]
        return [restore(key, await store.events(key), config.gate) for key in keys]


def _train(config: Config, found: Sequence[Material], owner: str, out: Path) -> None:
    from soma_vllm.method.recipe import load_surrogate
    from soma_vllm.models.hub import local_path
    from soma_vllm.models.quiet import quiet
    from soma_vllm.tools.evaluate.model_pair import distil, pool

    pooled = pool(found)
    training = config.training
    typer.echo(
        f"pooling {pooled.sessions} sessions: {len(pooled.examples)} turns to learn from, "
        f"{len(pooled.held_out)} held out"
    )
    assert config.surrogate_model is not None, "for_serving has checked"
    folder = local_path(config.surrogate_model)
    dtype = training_dtype(training.dtype, training.device)
    with quiet():
        surrogate = load_surrogate(folder, dtype, training.device, training.threads)
    learnt = distil(surrogate, pooled, config, owner, out)
    for point in learnt.checkpoints:
        kept = "  <- kept" if point.steps == learnt.steps else ""
        typer.echo(
            f"after {point.steps:4} steps: held-out NLL {point.agreement.nll:.4f}, "
            f"top-1 {point.agreement.top1:.4f}{kept}"
        )
    typer.echo(f"adapter    {out} ({learnt.mining_s + learnt.finetune_s:.0f} s); use it as lora.init_from")
