"""Capacity: how many sessions an hour an arm serves within its target, found by raising the arrival rate.

A rung is one block played at one rate, open loop. Its strain is the 90th percentile, over turns, of the larger
of answer time and first-token time, each over its target: up to 1 the target is met. Capacity is the rate at
which the strain is 1, between the last rung that met it and the first that did not, on logarithmic axes.

Guarantee: a capacity is told only where one rung met the target and a faster one did not; else a bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from study.client import Answered
from study.outcome import Course, resampled


@dataclass(frozen=True)
class Targets:
    """What a user accepts, seconds."""

    ttft_s: float
    latency_s: float

    def met(self, turn: Answered) -> bool:
        """By one turn."""
        return turn.ttft_s <= self.ttft_s and turn.latency_s <= self.latency_s

    def strain(self, turns: Sequence[Answered]) -> float:
        """At most 1 where nine turns of ten are within the target."""
        worst = [max(turn.ttft_s / self.ttft_s, turn.latency_s / self.latency_s) for turn in turns]
        return float(np.percentile(worst, 90))


@dataclass(frozen=True)
class Rung:
    """One rate that was played."""

    rate: float
    """Sessions an hour."""
    courses: tuple[Course, ...]


def next_rate(strains: Mapping[float, float]) -> float:
    """The rate to play next, after those with these strains: between the two bounds, or beyond the only one.

    How far beyond grows with the distance of its strain from 1, since a rung takes minutes: 2 to 16 times.
    """
    met = [rate for rate, strain in strains.items() if strain <= 1.0]
    missed = [rate for rate, strain in strains.items() if strain > 1.0]
    if not missed:
        return max(met) * _clipped(2.0 / strains[max(met)])
    if not met:
        return min(missed) / _clipped(2.0 * strains[min(missed)])
    return math.sqrt(max(met) * min(missed))


def _clipped(factor: float) -> float:
    return min(max(factor, 2.0), 16.0)


def at_target(strains: Mapping[float, float]) -> tuple[float | None, float | None]:
    """(highest rate that met the target below the first that missed it, that first one); None: none."""
    missed = min((rate for rate, strain in strains.items() if strain > 1.0), default=None)
    met = max((r for r, s in strains.items() if s <= 1.0 and (missed is None or r < missed)), default=None)
    return met, missed


def capacity(strains: Mapping[float, float]) -> float | None:
    """Sessions an hour at which the strain is 1; None where no two rungs enclose it."""
    met, missed = at_target(strains)
    if met is None or missed is None:
        return None
    low, high = math.log(max(strains[met], 1e-9)), math.log(strains[missed])
    way = -low / (high - low)
    return math.exp(math.log(met) + way * (math.log(missed) - math.log(met)))


def _clamped(strains: Mapping[float, float]) -> float:
    """For resamples: the nearest rate that was played where the target lies beyond them."""
    found = capacity(strains)
    if found is not None:
        return found
    met, missed = at_target(strains)
    return met if met is not None else min(strains) if missed is None else missed


def strains(rungs: Sequence[Rung], targets: Targets) -> dict[float, float]:
    """By rate."""
    return {
        one.rate: targets.strain([turn for course in one.courses for turn in course.turns])
        for one in sorted(rungs, key=lambda one: one.rate)
    }


def told(rungs: Sequence[Rung], targets: Targets) -> dict[str, Any]:
    """An arm's capacity and the rungs it rests on."""
    found = strains(rungs, targets)
    value = capacity(found)
    met, missed = at_target(found)
    return {
        "sessions_per_hour": None if value is None else round(value, 2),
        "at_least": None if met is None else round(met, 2),
        "less_than": None if missed is None else round(missed, 2),
        "rungs": [{"sessions_per_hour": round(rate, 2), "strain": round(s, 4)} for rate, s in found.items()],
    }


def compared(
    ours: Sequence[Rung], theirs: Sequence[Rung], targets: Targets
) -> tuple[float | None, list[float] | None]:
    """(our capacity over theirs, its interval); a resample beyond the rungs counts as the nearest one."""
    values = [capacity(strains(rungs, targets)) for rungs in (ours, theirs)]
    if values[0] is None or values[1] is None:
        return None, None
    names = [course.dialogue for rung in (*ours, *theirs) for course in rung.courses]
    if len(set(names)) < 2:
        return round(values[0] / values[1], 4), None
    found = []
    for draw in resampled(names, resamples=500):
        sides = []
        for rungs in (ours, theirs):
            by_rate: dict[float, float] = {}
            for rung in rungs:
                turns = [t for name in draw for c in rung.courses if c.dialogue == name for t in c.turns]
                if turns:
                    by_rate[rung.rate] = targets.strain(turns)
            sides.append(_clamped(by_rate) if by_rate else None)
        if sides[0] is not None and sides[1]:
            found.append(sides[0] / sides[1])
    low, high = np.percentile(found, [2.5, 97.5])
    return round(values[0] / values[1], 4), [round(float(low), 4), round(float(high), 4)]
