"""The gate's arithmetic: gap, locality, acceptance and drift (section 3.3, Corollary 4.3).

A score is not a decision: `gap` and `distance` return numbers; `judge` and `Drift.observe` turn numbers into
verdicts, with the reason, against thresholds that live in the configuration. Everything here is pure, so any
logged decision can be replayed with other thresholds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from soma_vllm.config import Gate
from soma_vllm.sessions.state.events import AuditKind
from soma_vllm.types import Candidate, Evidence

Vector = NDArray[np.float32]
"""An embedding, shape (d,). Encoders return unit vectors, or zeros for empty text."""

COST_ORDER = (Candidate.PLAIN, Candidate.ADAPTER)
"""Candidates from cheap to dear: an adapter costs a training and a slot."""


def gap(a: Vector, b: Vector) -> float:
    """1 - cos(a, b), in [0, 2]. Two empty texts agree (0); an empty and a non-empty one do not (1)."""
    norms = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    if norms == 0.0:
        return 0.0 if not a.any() and not b.any() else 1.0
    cosine = float(np.dot(a.astype(np.float64), b.astype(np.float64))) / norms
    return min(2.0, max(0.0, 1.0 - cosine))


def centroid(vectors: Sequence[Vector]) -> Vector:
    """Mean of the warm start's query embeddings, shape (d,)."""
    mean: Vector = np.mean(np.stack(vectors), axis=0, dtype=np.float32)
    return mean


@dataclass(frozen=True)
class Verdict:
    """Who serves the session, and why."""

    candidate: Candidate
    reason: str
    numbers: Mapping[str, Any]
    """What each candidate scored and the thresholds it was held to; JSON-compatible."""


def judge(
    evidence: Sequence[Evidence],
    gate: Gate,
    min_turns: int,
    allowed: Sequence[Candidate] = COST_ORDER,
    forced: Candidate | None = None,
    setbacks: int = 0,
) -> Verdict:
    """The cheapest candidate that passes, else the original (Cor. 4.3, with token agreement beside the gap).

    A candidate passes when its mean gap over at least `min_turns` held-out turns plus the margin is at most
    eps, and its token agreement is at least `min_agreement`. The adapter must besides undercut the
    plain surrogate's NLL on the same held-out answers by the share `min_gain`: it costs more, and a difference
    within the noise of a turn or two is no gain. A candidate that is not `allowed` is compared with but never
    chosen; `forced` overrules the verdict, not the numbers. Every setback the session has had, a rollback or a
    refusal, multiplies eps by `readmit_factor`: what failed before must be better to pass.
    """
    eps = gate.accept_threshold * gate.readmit_factor**setbacks
    by_candidate = {item.candidate: item for item in evidence}
    plain = by_candidate.get(Candidate.PLAIN)
    failures = {
        candidate: _failure(by_candidate[candidate], plain, gate, eps, min_turns)
        for candidate in COST_ORDER
        if candidate in by_candidate
    }
    numbers = {
        "candidates": {c.value: _numbers(by_candidate[c], failure) for c, failure in failures.items()},
        "accept_threshold": eps,
        "setbacks": setbacks,
        "accept_margin": gate.accept_margin,
        "min_agreement": gate.min_agreement,
        "min_gain": gate.min_gain,
        "min_turns": min_turns,
    }
    passing = (c for c, failure in failures.items() if failure is None and c in allowed)
    passed = next(passing, Candidate.ORIGINAL)
    if forced is not None and forced in by_candidate:
        opinion = "the gate agrees" if failures[forced] is None else f"the gate says {failures[forced]}"
        return Verdict(forced, f"forced ({opinion})", numbers)
    if passed is Candidate.ORIGINAL:
        objections = (f"{c}: {failure or 'not allowed'}" for c, failure in failures.items())
        why = "; ".join(objections) or "no candidate was judged"
        return Verdict(passed, why, numbers)
    return Verdict(passed, f"gap {_mean(by_candidate[passed].gaps):.3f} within {eps:g}", numbers)


def _failure(item: Evidence, plain: Evidence | None, gate: Gate, eps: float, min_turns: int) -> str | None:
    """Why a candidate does not pass; None when it does."""
    if len(item.gaps) < min_turns:
        return f"judged on {len(item.gaps)} turns, fewer than {min_turns}"
    reached = _mean(item.gaps) + gate.accept_margin
    if not reached <= eps:  # also refuses NaN
        return f"gap {reached:.3f} above {eps:g}"
    if item.agreement is None:
        return f"no token agreement, at least {gate.min_agreement:g} needed" if gate.min_agreement else None
    if not item.agreement.top1 >= gate.min_agreement:
        return f"token agreement {item.agreement.top1:.3f} below {gate.min_agreement:g}"
    if item.candidate is Candidate.PLAIN or plain is None or plain.agreement is None:
        return None
    if not item.agreement.nll <= (1.0 - gate.min_gain) * plain.agreement.nll:
        least = f"{gate.min_gain:.0%} less than plain {plain.agreement.nll:.3f}"
        return f"held-out NLL {item.agreement.nll:.3f} is not {least}"
    return None


def _numbers(item: Evidence, failure: str | None) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "turns": list(item.turns),
        "gaps": [round(g, 4) for g in item.gaps],
        "mean_gap": round(_mean(item.gaps), 4) if item.gaps else None,
        "passes": failure is None,
        "failure": failure,
    }
    if item.agreement is not None:
        numbers |= {"nll": round(item.agreement.nll, 4), "top1": round(item.agreement.top1, 4)}
    return numbers


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


_LEAST_THRESHOLD = 1.0e-9
"""Stands for a threshold of 0, under which any drift at all is a breach."""


@dataclass(frozen=True)
class Audit:
    """One audited turn, in its own unit and in that of the drift window."""

    kind: AuditKind
    value: float
    relative: float
    """`value` over the threshold of its kind: 1 is just at the threshold."""


@dataclass(frozen=True)
class Drift:
    """The drift monitor's state: a moving window of audits of either kind and the breaches in a row."""

    window: tuple[Audit, ...] = ()
    breaches: int = 0

    def observe(self, kind: AuditKind, value: float, gate: Gate) -> Drift:
        """The state after one audit. A breach is a moving mean above 1, the thresholds' own; calm resets."""
        threshold = gate.drift_threshold if kind == "gap" else gate.surprise_threshold
        audit = Audit(kind, value, value / max(threshold, _LEAST_THRESHOLD))
        after = Drift((*self.window, audit)[-gate.drift_window :])
        breached = not after.moving() <= 1.0
        return Drift(after.window, self.breaches + 1 if breached else 0)

    def moving(self) -> float:
        """Mean over the window, relative to the thresholds; NaN before the first audit."""
        return _mean([audit.relative for audit in self.window])

    def demands_rollback(self, gate: Gate) -> bool:
        """True after m_cons breaches in a row."""
        return self.breaches >= gate.consecutive_to_rollback
