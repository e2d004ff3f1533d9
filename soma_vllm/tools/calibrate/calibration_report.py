"""A calibration as people and machines read it: sentences, a table, the document calibration.json.

Nothing here reads or writes a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from soma_vllm.tools.calibrate.thresholds import Axis, Bad, Case, Missing, Outcome, Point, Rate, Recommendation

ROWS = 20
"""Most rows of a printed curve; calibration.json has all of them."""


@dataclass(frozen=True)
class Calibrated:
    """One axis: its curve and what follows from it."""

    axis: Axis
    points: tuple[Point, ...]
    advice: Recommendation
    supported: float | None
    """The loosest threshold that ordinary logs can speak for; None without any."""
    free: int
    """Cases with an outcome that was measured whatever the gate decided: they speak for every threshold."""
    in_force: tuple[float, ...]


def left_out(cases: Sequence[Case]) -> dict[str, int]:
    """How many cases have no outcome, by the reason."""
    counts = Counter(case.outcome for case in cases if isinstance(case.outcome, Missing))
    return {missing.value: counts[missing] for missing in Missing if counts[missing]}


def limits(found: Calibrated) -> list[str]:
    """How far these sources can see, and what to do to see further."""
    free = f"Cases measured whatever the gate decided (forced sessions, evaluations): {found.free}"
    loosest = 2.0 if found.axis is Axis.GAP else 0.0
    if found.supported is None:
        return [f"{free}. They speak for every threshold."]
    if found.supported == loosest:
        return []
    side = "above" if found.axis is Axis.GAP else "below"
    lines = [
        f"In force: {', '.join(f'{value:g}' for value in found.in_force)}. What the gate refused was never "
        f"audited: {found.supported:g} is the loosest threshold that logs of served sessions can speak for."
    ]
    if found.free:
        return [*lines, f"{free}. They alone speak {side} {found.supported:g}."]
    see = "force sessions (X-SOMA-Force), serve some under a looser gate, or add an evaluation.json"
    return [*lines, f"To see {side} that, {see}."]


def verdict(found: Calibrated, point: bool) -> str:
    """The recommendation as a sentence, or what is missing for one."""
    advice = found.advice
    bound = "rate" if point else "upper 95 % bound"
    if advice.point is not None:
        rate, moved = advice.point.false_accepts, advice.point.moved
        return (
            f"use gate.{found.axis}={advice.point.threshold:g}: false accepts {_share(rate)}, {bound} within "
            f"{advice.target:g}; moves {_share(moved)} of the adaptations"
        )
    if advice.nearest is None:
        return f"no recommendation: found no accepted case; expected at least {advice.needed}, none of them bad"
    rate = advice.nearest.false_accepts
    start = (
        f"no recommendation: the {bound} of the false-accept rate is within {advice.target:g} at no threshold. "
        f"Closest: {advice.nearest.threshold:g} with {_share(rate)}."
    )
    if advice.needed_at_rate is not None:
        return (
            f"{start} At that rate {advice.needed_at_rate} accepted cases are needed, found {rate.total}; "
            f"{advice.needed} if none is bad."
        )
    own = "That rate itself is not below the target: more cases alone will not help there."
    return f"{start} {own}" if point else f"{start} {own} It takes {advice.needed} if none is bad."


def table(found: Calibrated) -> Table:
    """The curve, in 80 columns."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    grid.add_column("threshold", no_wrap=True)
    for heading in ("accepted", "bad", "false accepts\n95 %", "let through\n95 %", "moved\n95 %"):
        grid.add_column(heading, justify="right", no_wrap=True)
    for point in _thinned(found):
        mark = " <" if point is found.advice.point else ""
        grid.add_row(
            f"{point.threshold:.4f}{mark}",
            str(point.false_accepts.total),
            str(point.false_accepts.count),
            *(_cell(rate) for rate in (point.false_accepts, point.let_through, point.moved)),
            style="bold green" if mark else "",
        )
    return grid


def _thinned(found: Calibrated) -> list[Point]:
    """At most ROWS points, evenly chosen, and the recommended one."""
    points = found.points
    if len(points) <= ROWS:
        return list(points)
    kept = {round(step * (len(points) - 1) / (ROWS - 1)) for step in range(ROWS)}
    return [p for number, p in enumerate(points) if number in kept or p is found.advice.point]


def _cell(rate: Rate) -> str:
    low, high = rate.interval
    return "-" if rate.value is None else f"{rate.value:.0%} {low:.0%}-{high:.0%}"


def _share(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.count} of {rate.total} ({low:.1%} to {high:.1%})"


def document(
    cases: Sequence[Case], found: Sequence[Calibrated], bad: Bad, point: bool, sources: Sequence[str]
) -> dict[str, Any]:
    """What `calibration.json` holds."""
    outcomes = [case.outcome for case in cases if isinstance(case.outcome, Outcome)]
    return {
        "target": found[0].advice.target,
        "held_to_target": "rate" if point else "upper bound of the 95 % Wilson interval",
        "bad": {"gap": bad.gap, "top1": bad.top1},
        "sources": list(sources),
        "cases": {
            "all": len(cases),
            "with_outcome": len(outcomes),
            "bad": sum(bad(outcome) for outcome in outcomes),
            "left_out": left_out(cases),
        },
        **{one.axis.value: _axis_json(one, point) for one in found},
        "evidence": [_case_json(case, bad) for case in cases],
    }


def _axis_json(one: Calibrated, point: bool) -> dict[str, Any]:
    advice = one.advice
    return {
        "recommended": None if advice.point is None else advice.point.threshold,
        "verdict": verdict(one, point),
        "cases_needed": advice.needed,
        "cases_needed_at_rate": advice.needed_at_rate,
        "supported": one.supported,
        "measured_anyway": one.free,
        "in_force": list(one.in_force),
        "curve": [_point_json(p) for p in one.points],
    }


def _point_json(point: Point) -> dict[str, Any]:
    rates = {"false_accepts": point.false_accepts, "let_through": point.let_through, "moved": point.moved}
    return {
        "threshold": point.threshold,
        "cases": point.cases,
        **{name: _rate_json(rate) for name, rate in rates.items()},
    }


def _rate_json(rate: Rate) -> dict[str, Any]:
    return {"count": rate.count, "total": rate.total, "rate": rate.value, "ci95": list(rate.interval)}


def _case_json(case: Case, bad: Bad) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "session": case.session,
        "adaptation": case.adaptation,
        "candidate": case.candidate.value,
        "gap": case.gap,
        "top1": case.top1,
    }
    if isinstance(case.outcome, Missing):
        return entry | {"left_out": case.outcome.value}
    outcome = case.outcome
    later = {"later_gap": outcome.gap, "later_top1": outcome.top1, "later_turns": outcome.turns}
    return entry | later | {"bad": bad(outcome), "measured_anyway": case.free}
