"""`soma distill`: one adapter from many sessions of one tenant, for that tenant's sessions to start from.

Guarantees: every mistake is reported before anything is loaded; sessions of two tenants are never pooled; the
last warm turns of every session are held out and decide how many steps are kept; the output directory is
written whole or not at all.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from soma_vllm.config import Config, load_config
from soma_vllm.errors import ConfigError, SomaError, TrainingError
from soma_vllm.sessions.state.fold import restore
from soma_vllm.sessions.state.session import Session
from soma_vllm.tools.command_line import InputProblems, Overrides, PairConfig, fill_paths, make_out
from soma_vllm.tools.evaluate.dataset import (
    Material,
    drop_foreign_teachers,
    material,
    material_of_session,
    split_by_length,
)
from soma_vllm.tools.evaluate.trajectory import load_trajectories
from soma_vllm.tools.replay.dialogues import Dialogues, load_dialogues
from soma_vllm.training.pair import ANYONE
from soma_vllm.types import MANIFEST, Example

if TYPE_CHECKING:
    from soma_vllm.method.recipe import Learnt, Surrogate


def distill(
    config: PairConfig,
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
    overrides: Overrides = None,
) -> None:
    """Train an adapter once, offline, on pooled sessions: from a dialogue file, or one tenant's log.

    It starts only sessions of that tenant (those of any tenant, when made from your own dialogue file). Exits
    with 1 when nothing can be trained, with 2 on wrong input.
    """
    resolved, script = _prepare(config, dialogues, tenant, overrides or [], out)
    try:
        if tenant is None:
            # Sessions of the operator's own, played to the original once and remembered.
            played = asyncio.run(
                load_trajectories(resolved, script, resolved.original.max_num_seqs, typer.echo)
            )
            found = [material(trajectory, resolved) for trajectory in played.values()]
        else:
            found = _from_log(resolved, tenant, storage, sessions)
        _train(resolved, pool(found), ANYONE if tenant is None else tenant, out)
    except SomaError as error:
        typer.echo(f"soma distill: {error}", err=True)
        raise typer.Exit(1) from None


def _prepare(
    path: Path, dialogues: Path | None, tenant: str | None, overrides: Sequence[str], out: Path
) -> tuple[Config, Dialogues]:
    """Read everything, or exit with 2 after printing all that is wrong."""
    problems = InputProblems()
    if (dialogues is None) == (tenant is None):
        found = "neither" if dialogues is None else "both"
        problems.append(f"found {found} of --dialogues and --tenant; expected one: what is to be pooled")
    config = problems.attempt(lambda: load_config(path, overrides).for_serving(str(path)))
    script = None if dialogues is None else problems.attempt(lambda: load_dialogues(dialogues))
    if config is not None and script is not None:
        script, short = split_by_length(script, config)
        if not script:
            problems.append(str(ConfigError(str(dialogues), short)))
    if not problems:
        problems.attempt(lambda: _require_new(out))
    if problems or config is None:
        problems.exit()
    return config, script or {}


def _require_new(out: Path) -> None:
    """Raises ConfigError: `out` holds files, or its folder cannot be made."""
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out}", ["found files there; expected a new or an empty directory"])
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}", ["found a file; expected a new or an empty directory"])
    try:
        make_out(out.parent)
    except ConfigError as error:
        raise ConfigError(f"--out {out}", error.problems) from error


def _from_log(config: Config, tenant: str, storage: str | None, most: int) -> list[Material]:
    """One tenant's sessions as they were logged.

    Raises:
        TrainingError: it has none with a complete warm start.
        ConfigError: there is no such log.
    """
    url = fill_paths(storage or config.storage.location, "storage.url", "--storage")
    logged = asyncio.run(_restore(config, tenant, url, most))
    found = [session for session in (material_of_session(one, config) for one in logged) if session is not None]
    if not found:
        raise TrainingError(
            f"tenant {tenant!r}: found {len(logged)} logged sessions, none with {config.warm_window} turns "
            "of the original to learn from"
        )
    return found


async def _restore(config: Config, tenant: str, url: str, most: int) -> list[Session]:
    """The tenant's latest sessions, folded from their events."""
    from soma_vllm.sessions.sql.store import reading

    async with reading(url) as store:
        keys = [found.key for found in await store.summaries(tenant, most)]
        return [restore(key, await store.events(key), config.gate) for key in keys]


@dataclass(frozen=True)
class Pool:
    """Turns of many sessions, renumbered so that no two have the same number."""

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    sessions: int


def pool(materials: Sequence[Material]) -> Pool:
    """Every session's turns but its held-out ones, under the configured prefix.

    Raises:
        TrainingError: no sessions.
    """
    if not materials:
        raise TrainingError("found no sessions to pool; expected at least one with a complete warm start")
    examples = [e for found in materials for e in (*found.examples, *found.later)]
    held_out = [e for found in materials for e in found.held_out]
    numbered = [replace(example, turn=number) for number, example in enumerate([*examples, *held_out], start=1)]
    return Pool(tuple(numbered[: len(examples)]), tuple(numbered[len(examples) :]), len(materials))


def _train(config: Config, pooled: Pool, owner: str, out: Path) -> None:
    from soma_vllm.tools.evaluate.harness import load_trainable

    typer.echo(
        f"pooling {pooled.sessions} sessions: {len(pooled.examples)} turns to learn from, "
        f"{len(pooled.held_out)} held out"
    )
    learnt = train_pair(load_trainable(config), pooled, config, owner, out)
    for point in learnt.checkpoints:
        kept = "  <- kept" if point.steps == learnt.steps else ""
        typer.echo(
            f"after {point.steps:4} steps: held-out NLL {point.agreement.nll:.4f}, "
            f"top-1 {point.agreement.top1:.4f}{kept}"
        )
    typer.echo(f"adapter    {out} ({learnt.mining_s + learnt.finetune_s:.0f} s); use it as lora.init_from")


def train_pair(surrogate: Surrogate, pooled: Pool, config: Config, tenant: str, out: Path) -> Learnt:
    """Train one adapter on the pool and write it to `out`, which sessions name as `lora.init_from`.

    Raises:
        TrainingError: `out` is not empty, or the training failed; nothing is left behind.
    """
    from soma_vllm.method.recipe import adapt

    if out.exists() and any(out.iterdir()):
        raise TrainingError(f"--out {out}: found files there; expected a new or an empty directory")
    tokenizer = surrogate.tokenizer
    examples = drop_foreign_teachers(pooled.examples, tokenizer)
    held_out = drop_foreign_teachers(pooled.held_out, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".soma-distill-", dir=out.parent))
    lora, seed = config.lora.model_copy(update={"init_from": None}), config.training.seed
    try:
        learnt = adapt(surrogate, examples, held_out, config.mining, lora, seed, draft)
        text = json.dumps(_manifest(learnt, pooled, config, tenant), indent=2) + "\n"
        (draft / MANIFEST).write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return learnt


def _manifest(learnt: Learnt, pooled: Pool, config: Config, tenant: str) -> Mapping[str, object]:
    """What the adapter is made of; numbers only, no text."""
    return {
        "surrogate_model": config.surrogate_model,
        "tenant": tenant,
        "sessions": pooled.sessions,
        "turns": len(pooled.examples),
        "steps": learnt.steps,
        "distilled": learnt.distilled,
        "plain": asdict(learnt.plain),
        "adapted": asdict(learnt.adapted),
        "checkpoints": [{"steps": point.steps, **asdict(point.agreement)} for point in learnt.checkpoints],
        "train_s": round(learnt.mining_s + learnt.finetune_s, 3),
        "prefix": config.prefix.model_dump(mode="json"),
        "lora": config.lora.model_dump(mode="json"),
    }
