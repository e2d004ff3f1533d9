"""The figure of a calibration: the false-accept rate of each threshold with its interval, and what it moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soma_vllm.tools.calibrate.calibration_report import Calibrated
from soma_vllm.tools.calibrate.thresholds import Axis

INK = "#22262b"
BAD = "#cf3a3a"
MOVED = "#3b6ea8"
GOOD = "#4fa36c"
_NAMES = {Axis.GAP: "gate.accept_threshold (gap)", Axis.TOP1: "gate.min_agreement (top-1)"}


def draw(found: Sequence[Calibrated], path: Path) -> None:
    """Write the figure as a PNG, one panel per axis.

    Args:
        found: at least one axis, each with a curve.
        path: where to write; its directory exists.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure(figsize=(5.4 * len(found) + 0.6, 4.8), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, one in zip(panels, found, strict=True):
            _panel(axes, one)
        figure.suptitle(
            "What a threshold lets through", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK
        )
        shown = [panel.get_legend_handles_labels() for panel in panels]
        # A panel with a recommendation has one entry more than one without.
        handles, labels = max(shown, key=lambda entries: len(entries[1]))
        figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, dpi=130, format="png")


def _panel(axes: Any, one: Calibrated) -> None:
    # Decisions change at the thresholds alone; between two of them they are those of the stricter one.
    points = one.points if one.axis is Axis.GAP else one.points[::-1]
    where = "post" if one.axis is Axis.GAP else "pre"
    accepting = [point for point in points if point.false_accepts.total]
    at = [point.threshold for point in accepting]
    rates = [point.false_accepts.count / point.false_accepts.total for point in accepting]
    low = [point.false_accepts.interval[0] for point in accepting]
    high = [point.false_accepts.interval[1] for point in accepting]
    moved = [point.moved.count / point.moved.total for point in points]
    axes.fill_between(at, low, high, step=where, color=BAD, alpha=0.15, linewidth=0, label="its 95 % interval")
    axes.step(at, rates, where=where, color=BAD, marker=".", label="false-accept rate")
    thresholds = [point.threshold for point in points]
    axes.step(thresholds, moved, where=where, color=MOVED, linewidth=1, label="adaptations moved")
    axes.axhline(one.advice.target, color=INK, linestyle="--", linewidth=1, label="target")
    if one.advice.point is not None:
        axes.axvline(one.advice.point.threshold, color=GOOD, linewidth=2, label="recommended")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(_NAMES[one.axis])
    axes.spines[["top", "right"]].set_visible(False)
