"""Calibration of the gate's thresholds from judged cases: cases -> curve -> recommendation. No I/O.

A *case* is one candidate of one adaptation of one session. Its *evidence* is what the gate knew: the mean gap
over the held-out turns plus the margin, and the token agreement (top-1) on them. Its *outcome* is the mean gap
of the turns that this candidate answered afterwards and that were audited (in an offline evaluation: of all
later turns). It is *bad* if that exceeds the bad gap. At a threshold, of the cases with an outcome:

* false-accept rate = accepted bad / accepted
* let through = accepted bad / all bad
* moved = adaptations in which some candidate passes / all adaptations. This needs no outcome. It is a lower
  bound below the threshold in force: the gate trains no adapter where the plain surrogate passes.

A case is accepted on one axis when its evidence passes that axis' threshold and everything else the gate
asked of it, as it was in force. Every rate carries its Wilson interval of 95 %.

Censoring: what was refused is never audited, so a log says nothing about candidates beyond the threshold in
force. At each threshold only those cases count whose gate would have accepted up to it, or whose outcome was
measured whatever the gate decided (`free`); the others would show the good side of their sessions alone.

Further limits: a session that was rolled back has outcomes up to its rollback only, and a mean over few audits
is noisy. The interval is that of one threshold; taking the loosest of many that pass is optimistic: in
simulated populations of 250 cases, 6 % of recommendations miss the target instead of 2.5 %. A session that is
judged again is held to a stricter threshold, which counts as the one in force; its cases are taken for
independent, which they are not quite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

import numpy as np

from soma_vllm.types import Candidate

Z = NormalDist().inv_cdf(0.975)
"""Two-sided 95 %."""


class Axis(StrEnum):
    """A threshold of section `gate` in the configuration.

    Both are compared as *levels*, which grow as the threshold loosens: a case passes at or above its own level.
    """

    GAP = "accept_threshold"
    """Passes at or below the threshold."""
    TOP1 = "min_agreement"
    """Passes at or above the threshold."""

    @property
    def loosest(self) -> float:
        """The level at which everything passes."""
        return 2.0 if self is Axis.GAP else 0.0

    def threshold(self, level: float) -> float:
        """A level as it stands in the configuration."""
        return level if self is Axis.GAP else abs(level)


class Missing(StrEnum):
    """Why a case has no outcome."""

    REFUSED = "the original kept the session"
    OTHER = "another candidate served"
    UNAUDITED = "it served, but none of its turns was audited"
    SCORED = "it served, but its audits measured no gap (audit: score)"
    ENDED = "the session was rewritten or ended before the switch"
    UNSPOKEN = "its later turns were measured without free-running answers"
    VOID = "judged on no gap that is a number"


@dataclass(frozen=True)
class Outcome:
    """What came of a candidate that served."""

    gap: float
    """Mean gap of its audited turns, in [0, 2]."""
    turns: int
    top1: float | None = None
    """Token agreement on its later turns, where it was measured."""

    def is_bad(self, bad_gap: float) -> bool:
        """Whether it exceeds the bad gap; one that is not a number does."""
        return not self.gap <= bad_gap


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
    """In force when it was judged, as is `min_agreement`."""
    min_agreement: float
    outcome: Outcome | Missing
    barred: bool = False
    """True when the gate refuses it whatever these two thresholds are."""
    free: bool = False
    """True when its outcome was measured whatever the gate decided: forced by the client, or offline."""
    judgement: tuple[str, float] = ("", 0.0)
    """The session's bare id and the Unix time: by these it is recognised in another source."""

    def level(self, axis: Axis) -> float | None:
        """The strictest level at which its evidence passes; None without evidence on this axis."""
        if axis is Axis.GAP:
            return self.gap
        return None if self.top1 is None else -self.top1

    def in_force(self, axis: Axis) -> float:
        """The level in force when it was judged."""
        return self.accept_threshold if axis is Axis.GAP else -self.min_agreement

    def passes_otherwise(self, axis: Axis) -> bool:
        """Whether it passes everything that the gate asks for besides this axis' threshold."""
        if axis is Axis.TOP1:
            return not self.barred and self.gap <= self.accept_threshold
        return not self.barred and (self.top1 or 0.0) >= self.min_agreement


@dataclass(frozen=True)
class Rate:
    """A share, with its uncertainty."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """The share; None if the total is 0."""
        return self.count / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's interval of 95 %; (0, 1) if the total is 0."""
        return wilson(self.count, self.total)


@dataclass(frozen=True)
class Point:
    """One threshold on the curve; its rates are defined at the top of this module."""

    threshold: float
    false_accepts: Rate
    let_through: Rate
    moved: Rate
    cases: int
    """Cases with an outcome that count at this threshold, accepted or not."""


@dataclass(frozen=True)
class Calibration:
    """What cases say about one threshold: the curve, and the value to use, or what is missing to name one."""

    axis: Axis
    target: float
    """False-accept rate to stay within."""
    points: tuple[Point, ...]
    supported: float | None = None
    """The loosest threshold in force for a case with an outcome; beyond it only `free` cases count."""
    free: int = 0
    """Cases with an outcome that was measured whatever the gate decided."""
    in_force: tuple[float, ...] = ()

    @property
    def best(self) -> Point | None:
        """The loosest threshold at which the upper bound of the false-accept rate stays within the target; None
        when there is none."""
        within = [point for point in self._accepting() if _bound(point) <= self.target]
        return within[-1] if within else None

    @property
    def nearest(self) -> Point | None:
        """The threshold that comes closest to the target; None without any accepted case."""
        return min(self._accepting(), key=_bound, default=None)

    @property
    def needed_at_rate(self) -> int | None:
        """Accepted cases that suffice at the nearest threshold's own rate; None if that is above the target."""
        nearest = self.nearest
        return None if nearest is None else cases_needed(self.target, nearest.false_accepts.value or 0.0)

    def _accepting(self) -> list[Point]:
        return [point for point in self.points if point.false_accepts.total]


def _bound(point: Point) -> float:
    return point.false_accepts.interval[1]


def calibrate_axis(cases: Sequence[Case], axis: Axis, bad_gap: float, target: float) -> Calibration:
    """Everything that cases say about one threshold."""
    free = [case.free for case, _ in _with_outcome(cases, Axis.GAP)]
    levels = [case.in_force(axis) for case, _ in _with_outcome(cases, axis) if not case.free]
    return Calibration(
        axis=axis,
        target=target,
        points=curve(cases, axis, bad_gap),
        supported=axis.threshold(max(levels)) if levels else None,
        free=sum(free),
        in_force=tuple(sorted({axis.threshold(case.in_force(axis)) for case in cases})),
    )


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


def curve(cases: Sequence[Case], axis: Axis, bad_gap: float) -> tuple[Point, ...]:
    """A point for every threshold at which something changes, strictest first.

    Thresholds are the evidence of cases with an outcome and the thresholds in force. Cases without evidence on
    this axis are left out.
    """
    counted = _with_outcome(cases, axis)
    levels = np.asarray([level for _, level in counted])
    limits = np.asarray([axis.loosest if case.free else case.in_force(axis) for case, _ in counted])
    ill = np.asarray(
        [isinstance(case.outcome, Outcome) and case.outcome.is_bad(bad_gap) for case, _ in counted]
    )
    passing = np.asarray([case.passes_otherwise(axis) for case, _ in counted])
    adaptations: dict[tuple[str, int], float] = {}
    """The strictest level at which some candidate passes."""
    for case in cases:
        if (level := case.level(axis)) is not None:
            name = (case.session, case.adaptation)
            level = level if case.passes_otherwise(axis) else math.inf
            adaptations[name] = min(level, adaptations.get(name, math.inf))
    moves = np.asarray(list(adaptations.values()))
    points = []
    for level in sorted({*levels.tolist(), *(case.in_force(axis) for case, _ in counted if not case.free)}):
        counts = limits >= level
        accepted = counts & passing & (levels <= level)
        wrong = int((accepted & ill).sum())
        points.append(
            Point(
                axis.threshold(level),
                Rate(wrong, int(accepted.sum())),
                Rate(wrong, int((counts & ill).sum())),
                Rate(int((moves <= level).sum()), len(moves)),
                int(counts.sum()),
            )
        )
    return tuple(points)


def _with_outcome(cases: Sequence[Case], axis: Axis) -> list[tuple[Case, float]]:
    """The cases with an outcome and evidence on this axis, each with its level."""
    return [
        (case, level)
        for case in cases
        if isinstance(case.outcome, Outcome) and (level := case.level(axis)) is not None
    ]
