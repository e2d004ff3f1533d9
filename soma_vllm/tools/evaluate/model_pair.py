"""The pair's adapter: trained once, offline, on pooled sessions of one tenant, for sessions to start from.

Guarantees: what is pooled is one tenant's alone; the last warm turns of every session are held out and decide
how many steps are kept; the directory is written whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from soma_vllm.config import Config
from soma_vllm.errors import TrainingError
from soma_vllm.method.recipe import Learnt, Surrogate, adapt
from soma_vllm.tools.evaluate.dataset import Material, understood
from soma_vllm.types import MANIFEST, Example


@dataclass(frozen=True)
class Pool:
    """Turns of many sessions, numbered anew so that each has a number of its own."""

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
    learnt = [e for found in materials for e in (*found.examples, *found.later)]
    judged = [e for found in materials for e in found.held_out]
    numbered = [replace(example, turn=number) for number, example in enumerate([*learnt, *judged], start=1)]
    return Pool(tuple(numbered[: len(learnt)]), tuple(numbered[len(learnt) :]), len(materials))


def distil(surrogate: Surrogate, pooled: Pool, config: Config, tenant: str, out: Path) -> Learnt:
    """Train one adapter on the pool and write it to `out`, which sessions name as `lora.init_from`.

    Raises:
        TrainingError: `out` is not empty, or the training failed; nothing is left behind.
    """
    if out.exists() and any(out.iterdir()):
        raise TrainingError(f"--out {out}: found files there; expected a new or an empty directory")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".soma-distill-", dir=out.parent))
    lora = config.lora.model_copy(update={"init_from": None})
    try:
        learnt = adapt(
            surrogate,
            understood(pooled.examples, surrogate.tokenizer),
            understood(pooled.held_out, surrogate.tokenizer),
            config.mining,
            lora,
            config.training.seed,
            draft,
        )
        text = json.dumps(manifest(learnt, pooled, config, tenant), indent=2) + "\n"
        (draft / MANIFEST).write_text(text, encoding="utf-8")
        if out.exists():
            out.rmdir()
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return learnt


def manifest(learnt: Learnt, pooled: Pool, config: Config, tenant: str) -> Mapping[str, object]:
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
