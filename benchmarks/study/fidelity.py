"""How close an arm's answers stay to the original's: gap and ROUGE-L on later turns.

Every arm is compared with what the arm `original` answered to the same turn of the same session in the same
repeat. Both are free-running: each goes on from its own answers, as its users would see it, so that an early
difference carries on. `soma evaluate` asks the stricter question, token by token on the original's own
history; that takes a prefill of the original per turn, and is left to it. Two plays of the original differ
too, where batches fall differently: that gap is the floor, and is measured wherever there is more than one
repeat.

Fidelity is 1 - mean gap by the configuration's own judge (`gate.gap`); the gate promises 1 - accept_threshold
for the turns it gives to the surrogate. Reports of before 2026-11-28 have the encoder's cosine there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from soma_vllm.tools.evaluate.statistics import rouge_l
from soma_vllm.types import Gap
from study.client import Played

Gaps = Callable[[Sequence[tuple[str, str]]], Sequence[Gap]]
"""The gate's judge of pairs of answers: `GapJudge.gaps`."""


@dataclass(frozen=True)
class Compared:
    """One later turn beside the original's."""

    session: int
    turn: int
    engine: str
    gap: float
    rouge_l: float
    same: bool
    """Word for word."""
    agreement: float
    """Share of the longer answer's tokens before the first that differs."""


def compare(theirs: Sequence[Played], originals: Sequence[Played], warm: int, gaps: Gaps) -> list[Compared]:
    """Every turn after the warm start that both have."""
    pairs = [
        (session, turn, reference)
        for session, (one, other) in enumerate(zip(theirs, originals, strict=True))
        for turn, reference in zip(one.turns, other.turns, strict=False)
        if turn.turn > warm
    ]
    found = gaps([(turn.answer, reference.answer) for _, turn, reference in pairs])
    return [
        Compared(
            session,
            turn.turn,
            turn.engine,
            one.value,
            rouge_l(turn.answer, reference.answer),
            turn.answer == reference.answer,
            token_agreement(turn.answer, reference.answer),
        )
        for one, (session, turn, reference) in zip(found, pairs, strict=True)
    ]


def token_agreement(answer: str, reference: str) -> float:
    """Share of the longer answer's tokens (words, numbers, signs) that both begin with, in [0, 1].

    A free-running answer that differs once counts as different from there on.
    """
    found, expected = (re.findall(r"\w+|[^\w\s]", text) for text in (answer, reference))
    longest = max(len(found), len(expected))
    same = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    return 1.0 if not longest else (min(len(found), len(expected)) if same is None else same) / longest


def summary(compared: Sequence[Compared], promise: float) -> dict[str, Any]:
    """Means over turns; `promise` is what the gate promises."""
    served = [one for one in compared if one.engine == "surrogate"]
    fidelity = _fidelity(compared)
    return {
        "fidelity": fidelity,
        "fidelity_over_promise": None if fidelity is None or promise <= 0 else round(fidelity / promise, 4),
        "fidelity_of_surrogate_turns": _fidelity(served),
        "rouge_l": round(fmean(one.rouge_l for one in compared), 4) if compared else None,
        "token_agreement": round(fmean(one.agreement for one in compared), 4) if compared else None,
        "same_words": round(fmean(one.same for one in compared), 4) if compared else None,
        "turns": len(compared),
    }


def _fidelity(compared: Sequence[Compared]) -> float | None:
    return round(1.0 - fmean(one.gap for one in compared), 4) if compared else None
