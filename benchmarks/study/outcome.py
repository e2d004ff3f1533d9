"""What sessions got and cost, arm beside arm, with intervals: the study's own arithmetic. Pure.

Guarantees: a ratio is of means; an interval is a percentile bootstrap over dialogues, which are drawn with all
their repeats and in all arms at once, since the turns of a session are not independent of each other
(Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np

from study.client import Answered

RESAMPLES = 2000
BINS = ((1, 4), (5, 8), (9, 12), (13, None))
"""Turns, as the paper groups them."""


@dataclass(frozen=True)
class Course:
    """One session as it was played in an arm."""

    dialogue: str
    turns: tuple[Answered, ...]
    cost: float
    """Of the session, background and all."""
    kinds: frozenset[str] = frozenset()
    """Of the server's events."""

    @property
    def seconds(self) -> float:
        """Of waiting for answers, all turns together."""
        return sum(turn.latency_s for turn in self.turns)

    @property
    def grades(self) -> list[bool]:
        """Of the turns that have a check."""
        return [turn.correct for turn in self.turns if turn.correct is not None]


Courses = Sequence[Course]
Measure = Callable[[Courses], float | None]


def whole_time(courses: Courses) -> float | None:
    """Mean seconds that a session waited in all."""
    return fmean(one.seconds for one in courses) if courses else None


def net_cost(courses: Courses) -> float | None:
    """Mean cost of a session."""
    return fmean(one.cost for one in courses) if courses else None


def task_accuracy(courses: Courses) -> float | None:
    """Share of right turns among those with a check."""
    grades = [grade for one in courses for grade in one.grades]
    return fmean(grades) if grades else None


def session_accuracy(courses: Courses) -> float | None:
    """Share of sessions, among those with checks, whose turns are all right."""
    found = [all(one.grades) for one in courses if one.grades]
    return fmean(found) if found else None


def later_time(warm: int) -> Measure:
    """Mean latency of the turns after the warm start."""

    def measure(courses: Courses) -> float | None:
        times = [turn.latency_s for one in courses for turn in one.turns if turn.turn > warm]
        return fmean(times) if times else None

    return measure


RATIOS: Mapping[str, Measure] = {
    "whole_session_time_soma_over_original": whole_time,
    "net_cost_soma_over_original": net_cost,
    "task_accuracy_soma_over_original": task_accuracy,
}


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours over theirs; None where there is nothing to divide."""
    return None if ours is None or not theirs else ours / theirs


def resampled(dialogues: Sequence[str], seed: int = 0, resamples: int = RESAMPLES) -> list[list[str]]:
    """Draws of as many dialogues as there are, with replacement."""
    names = sorted(set(dialogues))
    draws = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    return [[names[number] for number in draw] for draw in draws]


def interval(
    arms: Sequence[Courses], statistic: Callable[[Sequence[Courses]], float | None], seed: int = 0
) -> list[float] | None:
    """95 % interval of a statistic of one or more arms; None where fewer than two dialogues were played."""
    by_name: list[dict[str, list[Course]]] = []
    for courses in arms:
        found: dict[str, list[Course]] = {}
        for one in courses:
            found.setdefault(one.dialogue, []).append(one)
        by_name.append(found)
    names = sorted(set.intersection(*(set(found) for found in by_name))) if by_name else []
    if len(names) < 2:
        return None
    values = []
    for draw in resampled(names, seed):
        value = statistic([[one for name in draw for one in found[name]] for found in by_name])
        if value is not None:
            values.append(value)
    if not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return [round(float(low), 4), round(float(high), 4)]


def compared(ours: Courses, theirs: Courses, measure: Measure) -> tuple[float | None, list[float] | None]:
    """(ratio of two arms' measures, its interval)."""
    value = ratio(measure(ours), measure(theirs))
    spread = interval((ours, theirs), lambda drawn: ratio(measure(drawn[0]), measure(drawn[1])))
    return _rounded(value), spread


def told(courses: Courses, warm: int) -> dict[str, Any]:
    """An arm's means beside medians, whole sessions beside later turns, with intervals."""
    times = [one.seconds for one in courses]
    later = [turn.latency_s for one in courses for turn in one.turns if turn.turn > warm]
    accuracies: tuple[Measure, ...] = (task_accuracy, session_accuracy)
    found: dict[str, Any] = {
        "whole_session_s": {"mean": _rounded(whole_time(courses)), "median": _rounded(median(times))},
        "later_turn_s": {
            "mean": _rounded(fmean(later)) if later else None,
            "median": _rounded(median(later)) if later else None,
        },
        "cost": _rounded(net_cost(courses)),
        "task_accuracy": _rounded(task_accuracy(courses)),
        "session_accuracy": _rounded(session_accuracy(courses)),
        "graded_turns": sum(len(one.grades) for one in courses),
    }
    measures = {"whole_session_s": whole_time, "later_turn_s": later_time(warm), "cost": net_cost}
    measures |= {measure.__name__: measure for measure in accuracies}
    found["intervals"] = {
        name: interval((courses,), lambda drawn, measure=measure: measure(drawn[0]))  # type: ignore[misc]
        for name, measure in measures.items()
    }
    return found


def by_workload(courses: Courses) -> dict[str, dict[str, Any]]:
    """Accuracy and time by workload, the part of a dialogue's name before its first dot."""
    found: dict[str, list[Course]] = {}
    for one in courses:
        found.setdefault(one.dialogue.partition(".")[0], []).append(one)
    return {
        name: {
            "task_accuracy": _rounded(task_accuracy(here)),
            "whole_session_s": _rounded(whole_time(here)),
            "sessions": len(here),
        }
        for name, here in sorted(found.items())
    }


def bins(ours: Courses, theirs: Courses) -> list[dict[str, Any]]:
    """Latency and generated tokens over the other arm's, means, by the paper's bins of turns."""
    rows = []
    for first, last in BINS:
        turns = [
            [turn for one in courses for turn in one.turns if first <= turn.turn <= (last or turn.turn)]
            for courses in (ours, theirs)
        ]
        if all(turns):
            time, tokens, prompt = (
                [fmean(getattr(turn, name) for turn in side) for side in turns]
                for name in ("latency_s", "completion_tokens", "prompt_tokens")
            )
            rows.append(
                {
                    "turns": f"{first}-{last}" if last else f"{first}+",
                    "latency": _rounded(ratio(*time)),
                    "completion_tokens": _rounded(ratio(*tokens)),
                    "prompt_tokens": _rounded(ratio(*prompt)),
                    "count": len(turns[0]),
                }
            )
    return rows


def drift(injected: Courses, calm: Courses, at: Mapping[str, int]) -> dict[str, Any]:
    """What a gate makes of sessions whose topic changes with the turn `at`, and of those whose does not.

    Recall is over sessions that the surrogate served just before the change: how many were rolled back, and how
    many of the turns from it on the original answered. A false rollback is one of a session without a change.
    """
    served = [one for one in injected if one.turns[at[one.dialogue] - 2].engine == "surrogate"]
    after = [turn for one in served for turn in one.turns if turn.turn >= at[one.dialogue]]
    switched = [one for one in calm if any(turn.engine == "surrogate" for turn in one.turns)]
    rolled = "rolled_back"
    return {
        "sessions": len(injected),
        "served_before": len(served),
        "recall": _rounded(fmean(rolled in one.kinds for one in served)) if served else None,
        "turns_to_the_original": _rounded(fmean(turn.engine == "original" for turn in after))
        if after
        else None,
        "switched_without_change": len(switched),
        "false_rollbacks": _rounded(fmean(rolled in one.kinds for one in switched)) if switched else None,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
