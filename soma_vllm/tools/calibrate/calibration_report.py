"""A calibration as people and machines read it: sentences, a table, `calibration.json`, a figure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from soma_vllm.tools.calibrate.thresholds import (
    Axis,
    Calibration,
    Case,
    Missing,
    Outcome,
    Rate,
    cases_needed,
)
from soma_vllm.tools.command_line import frameless
from soma_vllm.tools.figures import BLUE, GREEN, INK, RED, figure_file

ROWS = 20
"""Most rows of a printed curve; calibration.json has all of them."""


def limits(found: Calibration) -> list[str]:
    """How far the sources can see, and what to do to see further."""
    free = f"Cases measured whatever the gate decided (forced sessions, evaluations): {found.free}"
    if found.supported is None:
        return [f"{free}. They speak for every threshold."]
    if found.supported == found.axis.loosest:
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


def verdict(found: Calibration) -> str:
    """The recommendation as a sentence, or what is missing for one."""
    needed, best, nearest = cases_needed(found.target), found.best, found.nearest
    if best is not None:
        return (
            f"use gate.{found.axis}={best.threshold:g}: false accepts {_share(best.false_accepts)}, "
            f"upper 95 % bound within {found.target:g}; moves {_share(best.moved)} of the adaptations"
        )
    if nearest is None:
        return f"no recommendation: found no accepted case; expected at least {needed}, none of them bad"
    rate, at_rate = nearest.false_accepts, found.needed_at_rate
    start = (
        f"no recommendation: the upper 95 % bound of the false-accept rate is within {found.target:g} at no "
        f"threshold. Closest: {nearest.threshold:g} with {_share(rate)}."
    )
    if at_rate is not None:
        at_rate_text = f"At that rate {at_rate} accepted cases are needed, found {rate.total}"
        return f"{start} {at_rate_text}; {needed} if none is bad."
    own = "That rate itself is not below the target: more cases alone will not help there."
    return f"{start} {own} It takes {needed} if none is bad."


def table(found: Calibration) -> Table:
    """The curve, in 80 columns and at most `ROWS` rows, evenly chosen, besides the recommended one."""
    grid = frameless()
    grid.add_column("threshold", no_wrap=True)
    for heading in ("accepted", "bad", "false accepts\n95 %", "let through\n95 %", "moved\n95 %"):
        grid.add_column(heading, justify="right", no_wrap=True)
    best, last, rows = found.best, len(found.points) - 1, min(ROWS, len(found.points))
    shown = {round(step * last / max(1, rows - 1)) for step in range(rows)}
    for number, point in enumerate(found.points):
        mark = " <" if point is best else ""
        if number in shown or mark:
            grid.add_row(
                f"{point.threshold:.4f}{mark}",
                str(point.false_accepts.total),
                str(point.false_accepts.count),
                *(_cell(rate) for rate in (point.false_accepts, point.let_through, point.moved)),
                style="bold green" if mark else "",
            )
    return grid


def _axis_json(found: Calibration) -> dict[str, Any]:
    """This axis' entry in `calibration.json`."""
    best = found.best
    return {
        "recommended": None if best is None else best.threshold,
        "verdict": verdict(found),
        "cases_needed": cases_needed(found.target),
        "cases_needed_at_rate": found.needed_at_rate,
        "supported": found.supported,
        "measured_anyway": found.free,
        "in_force": list(found.in_force),
        "curve": [
            {name: _rate_json(part) if isinstance(part, Rate) else part for name, part in vars(point).items()}
            for point in found.points
        ],
    }


def count_missing(cases: Sequence[Case]) -> dict[str, int]:
    """How many cases have no outcome, by the reason."""
    counts = Counter(case.outcome for case in cases if isinstance(case.outcome, Missing))
    return {missing.value: counts[missing] for missing in Missing if counts[missing]}


def document(
    cases: Sequence[Case], found: Sequence[Calibration], bad_gap: float, sources: Sequence[str]
) -> dict[str, Any]:
    """What `calibration.json` holds."""
    outcomes = [case.outcome for case in cases if isinstance(case.outcome, Outcome)]
    return {
        "target": found[0].target,
        "held_to_target": "upper bound of the 95 % Wilson interval",
        "bad": {"gap": bad_gap, "top1": None},
        "sources": list(sources),
        "cases": {
            "all": len(cases),
            "with_outcome": len(outcomes),
            "bad": sum(outcome.is_bad(bad_gap) for outcome in outcomes),
            "left_out": count_missing(cases),
        },
        **{one.axis.value: _axis_json(one) for one in found},
        "evidence": [_case_json(case, bad_gap) for case in cases],
    }


def draw(found: Sequence[Calibration], path: Path) -> None:
    """The false-accept rate of each threshold with its interval, and what it moves, as a PNG.

    Args:
        found: at least one axis, each with a curve; one panel for each.
        path: where to write; its directory exists.
    """
    with figure_file(path, (5.4 * len(found) + 0.6, 4.8), "What a threshold lets through") as figure:
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, one in zip(panels, found, strict=True):
            _draw_panel(axes, one)
        shown = [panel.get_legend_handles_labels() for panel in panels]
        # A panel with a recommendation has one entry more than one without.
        handles, labels = max(shown, key=lambda entries: len(entries[1]))
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)


def _draw_panel(axes: Any, one: Calibration) -> None:
    # Decisions change at the thresholds alone; between two of them they are those of the stricter one.
    points = one.points if one.axis is Axis.GAP else one.points[::-1]
    where = "post" if one.axis is Axis.GAP else "pre"
    accepting = [point for point in points if point.false_accepts.total]
    at = [point.threshold for point in accepting]
    low, high = zip(*(point.false_accepts.interval for point in accepting), strict=True) if at else ((), ())
    axes.fill_between(at, low, high, step=where, color=RED, alpha=0.15, linewidth=0, label="its 95 % interval")
    rates = [point.false_accepts.value for point in accepting]
    axes.step(at, rates, where=where, color=RED, marker=".", label="false-accept rate")
    moved = [point.moved.value for point in points]
    thresholds = [point.threshold for point in points]
    axes.step(thresholds, moved, where=where, color=BLUE, linewidth=1, label="adaptations moved")
    axes.axhline(one.target, color=INK, linestyle="--", linewidth=1, label="target")
    best = one.best
    if best is not None:
        axes.axvline(best.threshold, color=GREEN, linewidth=2, label="recommended")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(f"gate.{one.axis} ({'gap' if one.axis is Axis.GAP else 'top-1'})")
    axes.spines[["top", "right"]].set_visible(False)


def _cell(rate: Rate) -> str:
    low, high = rate.interval
    return "-" if rate.value is None else f"{rate.value:.0%} {low:.0%}-{high:.0%}"


def _share(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.count} of {rate.total} ({low:.1%} to {high:.1%})"


def _rate_json(rate: Rate) -> dict[str, Any]:
    return {"count": rate.count, "total": rate.total, "rate": rate.value, "ci95": list(rate.interval)}


def _case_json(case: Case, bad_gap: float) -> dict[str, Any]:
    entry = {name: getattr(case, name) for name in ("session", "adaptation", "candidate", "gap", "top1")}
    if isinstance(case.outcome, Missing):
        return entry | {"left_out": case.outcome.value}
    outcome = case.outcome
    later = {"later_gap": outcome.gap, "later_top1": outcome.top1, "later_turns": outcome.turns}
    return entry | later | {"bad": outcome.is_bad(bad_gap), "measured_anyway": case.free}
