"""Calibration of the gate's thresholds from judged cases: cases -> curve -> recommendation. No I/O.

A *case* is one (session, adaptation, candidate). Its *evidence* is what the gate knew: the mean gap over the
held-out turns plus the margin, and the token agreement (top-1) on them. Its *outcome* is what came of it: the
mean gap of the turns that this candidate answered afterwards and that were audited (of an offline evaluation:
of all later turns). Turns outside the locality do not count, since the candidate did not answer them.

A case is *bad* if its outcome exceeds the bad gap, or if its later top-1 lies below the bad top-1 where one
is given. At a threshold, of the cases with an outcome:

* false-accept rate = accepted bad / accepted
* let through = accepted bad / all bad
* moved = adaptations in which some candidate passes / all adaptations. This needs no outcome. It is a lower
  bound below the threshold in force: the gate trains no adapter where the plain surrogate passes.

A case is accepted on one axis when its evidence passes that axis' threshold and everything else the gate
asked of it, as it was in force. Every rate carries its Wilson interval of 95 %.

Censoring: what was refused is never audited, so a log knows nothing of candidates beyond the
threshold in force. At each threshold only those cases count whose gate would have accepted up to it, or whose
outcome was measured whatever the gate decided (`free`); the others would show the good side of their sessions
alone. Further limits: a session that was rolled back has outcomes up to its rollback only, and a mean over
few audits is noisy. The interval is that of one threshold; taking the loosest of many that pass is
optimistic: in simulated populations of 250 cases, 6 % of recommendations miss the target instead of 2.5 %. A
session that is judged again, after a rollback or a refusal, is held to a stricter eps, and counts with that one
as the threshold in force; its cases are taken for independent, which they are not quite.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from soma_vllm.types import Candidate

Z = NormalDist().inv_cdf(0.975)
"""Two-sided 95 %."""


class Axis(StrEnum):
    """A threshold of section `gate` in the configuration."""

    GAP = "accept_threshold"
    """Passes at or below the threshold; a larger one is looser."""
    TOP1 = "min_agreement"
    """Passes at or above the threshold; a smaller one is looser."""


class Missing(StrEnum):
    """Why a case has no outcome."""

    REFUSED = "the original kept the session"
    OTHER = "another candidate served"
    UNAUDITED = "it served, but no turn of its was audited"
    SCORED = "it served, but its audits measured no gap (audit: score)"
    ENDED = "the session was rewritten or ended before the switch"
    UNSPOKEN = "its later turns were measured without free-running answers"


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate that served."""

    gap: float
    """Mean gap of its audited turns, in [0, 2]."""
    turns: int
    top1: float | None = None
    """Token agreement on its later turns, where it was measured."""


@dataclass(frozen=True)
class Case:
    """One candidate of one adaptation of one session."""

    session: str
    adaptation: int
    """1-based."""
    candidate: Candidate
    gap: float
    """Mean held-out gap plus the margin."""
    top1: float | None
    """Token agreement on the held-out turns; None where it was not measured."""
    accept_threshold: float
    """eps in force when it was judged."""
    min_agreement: float
    """In force when it was judged."""
    outcome: Outcome | Missing
    barred: bool = False
    """True when the gate refuses it whatever these two thresholds are."""
    free: bool = False
    """True when its outcome was measured whatever the gate decided: forced by the client, or offline."""


@dataclass(frozen=True)
class Bad:
    """What counts as a bad outcome."""

    gap: float
    top1: float | None = None

    def __call__(self, outcome: Outcome) -> bool:
        """Whether this outcome is bad; a top-1 that was not measured is not held against it."""
        if not outcome.gap <= self.gap:
            return True
        return self.top1 is not None and outcome.top1 is not None and outcome.top1 < self.top1


@dataclass(frozen=True)
class Rate:
    """A share, with its uncertainty."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """None of nothing."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of 95 %; (0, 1) of nothing."""
        return wilson(self.count, self.total)


@dataclass(frozen=True)
class Point:
    """One threshold on the curve."""

    threshold: float
    false_accepts: Rate
    """Accepted bad / accepted."""
    let_through: Rate
    """Accepted bad / all bad."""
    moved: Rate
    """Adaptations in which some candidate passes / all adaptations."""
    cases: int
    """Cases with an outcome that speak for this threshold, accepted or not."""


@dataclass(frozen=True)
class Recommendation:
    """The threshold to use, or what is missing to name one."""

    axis: Axis
    target: float
    point: Point | None
    """The loosest threshold within the target; None when there is none."""
    nearest: Point | None
    """The threshold that comes closest to the target; None without any accepted case."""
    needed: int
    """Accepted cases without a single bad one that would do."""
    needed_at_rate: int | None
    """Accepted cases that would do at the nearest threshold's own rate; None if that is above the target."""


def wilson(count: float, total: int) -> tuple[float, float]:
    """Wilson's score interval of 95 % for `count` of `total` (E. B. Wilson, JASA 22, 1927)."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = count / total, Z * Z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def cases_needed(target: float, rate: float = 0.0) -> int | None:
    """Accepted cases at which the upper bound of an observed `rate` falls to `target`; None if it never does.

    Wilson's interval inverts the score test, hence (target - rate)^2 = z^2 target (1 - target) / n.
    """
    if rate >= target:
        return None
    return math.ceil(Z * Z * target * (1 - target) / (target - rate) ** 2)


def supported(cases: Sequence[Case], axis: Axis) -> float | None:
    """The loosest threshold in force for a case with an outcome; beyond it only `free` cases speak.

    None where there are no others than those.
    """
    levels = [_in_force(case, axis) for case in _with_outcome(cases, axis) if not case.free]
    return _threshold(max(levels), axis) if levels else None


def curve(cases: Sequence[Case], axis: Axis, bad: Bad) -> tuple[Point, ...]:
    """A point for every threshold at which something changes, strictest first.

    Thresholds are the evidence of cases with an outcome and the thresholds in force. Cases without the evidence
    of this axis are left out.
    """
    counted = _with_outcome(cases, axis)
    if not counted:
        return ()
    costs = _array(_cost(case, axis) for case in counted)
    limits = _array(_limit(case, axis) for case in counted)
    ill = np.asarray([isinstance(case.outcome, Outcome) and bad(case.outcome) for case in counted])
    passing = np.asarray([_passes_otherwise(case, axis) for case in counted])
    doors = _array(_doors(cases, axis))
    in_force = {_in_force(case, axis) for case in counted if not case.free}
    points = []
    for level in sorted({*costs.tolist(), *in_force}):
        speaks = limits >= level
        accepted = speaks & passing & (costs <= level)
        wrong = int((accepted & ill).sum())
        points.append(
            Point(
                _threshold(level, axis),
                Rate(wrong, int(accepted.sum())),
                Rate(wrong, int((speaks & ill).sum())),
                Rate(int((doors <= level).sum()), len(doors)),
                int(speaks.sum()),
            )
        )
    return tuple(points)


def recommend(
    points: Sequence[Point], axis: Axis, target: float, by_point_estimate: bool = False
) -> Recommendation:
    """The loosest threshold whose false-accept rate stays within the target.

    Judged by the upper end of the rate's interval, or by the rate itself with `by_point_estimate`.
    """

    def reached(point: Point) -> float:
        rate = point.false_accepts
        return rate.count / rate.total if by_point_estimate else rate.interval[1]

    accepting = [point for point in points if point.false_accepts.total]
    within = [point for point in accepting if reached(point) <= target]
    nearest = min(accepting, key=reached, default=None)
    needed = cases_needed(target)
    assert needed is not None, "a target above 0"
    at_rate = None if nearest is None else cases_needed(target, nearest.false_accepts.value or 0.0)
    return Recommendation(axis, target, within[-1] if within else None, nearest, needed, at_rate)


# Both axes as one: a case passes where its cost is at most the level. Levels grow as thresholds loosen.


def _threshold(level: float, axis: Axis) -> float:
    return level if axis is Axis.GAP else abs(level)


def _cost(case: Case, axis: Axis) -> float:
    if axis is Axis.GAP:
        return case.gap
    assert case.top1 is not None, "cases without a top-1 are left out"
    return -case.top1


def _in_force(case: Case, axis: Axis) -> float:
    return case.accept_threshold if axis is Axis.GAP else -case.min_agreement


def _limit(case: Case, axis: Axis) -> float:
    """The loosest level up to which its gate would have let it serve."""
    if case.free:
        return 2.0 if axis is Axis.GAP else 0.0
    return _in_force(case, axis)


def _passes_otherwise(case: Case, axis: Axis) -> bool:
    """Whether it passes all that the gate asks beside this axis' threshold."""
    if case.barred:
        return False
    if axis is Axis.TOP1:
        return case.gap <= case.accept_threshold
    return case.min_agreement <= (0.0 if case.top1 is None else case.top1)


def _doors(cases: Sequence[Case], axis: Axis) -> list[float]:
    """For each adaptation, the strictest level at which some candidate passes; inf where none ever does."""
    doors: dict[tuple[str, int], float] = defaultdict(lambda: math.inf)
    for case in cases:
        if not _has_evidence(case, axis):
            continue
        cost = _cost(case, axis) if _passes_otherwise(case, axis) else math.inf
        name = (case.session, case.adaptation)
        doors[name] = min(doors[name], cost)
    return list(doors.values())


def _has_evidence(case: Case, axis: Axis) -> bool:
    return axis is Axis.GAP or case.top1 is not None


def _with_outcome(cases: Sequence[Case], axis: Axis) -> list[Case]:
    return [case for case in cases if isinstance(case.outcome, Outcome) and _has_evidence(case, axis)]


def _array(values: Iterable[float]) -> NDArray[np.float64]:
    return np.fromiter(values, dtype=np.float64)
