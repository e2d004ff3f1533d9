"""The two figures of an evaluation, drawn from its JSON alone: a report of another day gives the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soma_vllm.tools.evaluate.statistics import LEAST_PAIRS

INK = "#22262b"
PALE_INK = "#66707c"
COLORS = {"full": "#3b6ea8", "anchored": "#4fa36c", "sliding": "#f2b84b"}
"""By prefix."""
MARKERS = {
    "plain": "o",
    "uniform": "s",
    "soma-reference": "D",
    "soma": "^",
    "kd": "v",
    "soma-kd": "P",
    "kd-init": "*",
}
"""By method."""


def draw(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the figures that the document has numbers for; their paths."""
    import matplotlib as mpl

    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        return [*_differences(document, out / "nll.png"), *_tokens(document, out / "top1.png")]


def _differences(document: Mapping[str, Any], path: Path) -> list[Path]:
    """NLL of each variant minus its baseline's, with the interval over sessions."""
    from matplotlib.figure import Figure

    rows = [(name, row) for name, row in document["variants"].items() if row["diff_nll"] is not None]
    if not rows:
        return []
    figure = Figure(figsize=(8.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0.0, color=PALE_INK, linewidth=1)
    for lane, (_, row) in enumerate(rows):
        low, high = row["ci95_nll"] or (row["diff_nll"],) * 2
        color = COLORS[row["prefix"]]
        axes.plot([low, high], [lane, lane], color=color, linewidth=3, solid_capstyle="round")
        axes.plot(row["diff_nll"], lane, marker="o", color=color, markeredgecolor="white", markersize=8)
        each = [
            numbers["nll"] - document["variants"][row["against"]]["sessions"][session]["nll"]
            for session, numbers in row["sessions"].items()
        ]
        axes.plot(each, [lane + 0.22] * len(each), marker="|", linestyle="none", color=color, alpha=0.6)
    axes.set_yticks(range(len(rows)), [f"{name}\nagainst {row['against']}" for name, row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("NLL minus the baseline's, nats per token of the original's later answers; left is better")
    _bare(axes)
    figure.suptitle(
        f"Change on later turns (bar: 95 % interval, from {LEAST_PAIRS} sessions on; ticks: sessions)",
        x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.savefig(path, dpi=130, format="png")
    return [path]


def _tokens(document: Mapping[str, Any], path: Path) -> list[Path]:
    """Agreement against what the surrogate has to read for it."""
    from matplotlib.figure import Figure

    rows = list(document["variants"].items())
    if not rows or any(row["top1"] is None for _, row in rows):
        return []
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for name, row in sorted(rows, key=lambda pair: -pair[1]["top1"]):
        axes.plot(
            row["prompt_tokens"],
            row["top1"],
            marker=MARKERS[row["method"]],
            color=COLORS[row["prefix"]],
            markeredgecolor="white",
            markersize=10,
            linestyle="none",
            label=f"{row['top1']:.3f}  {name}",
        )
    full = document["variants"]["plain@full"]
    axes.axhline(0.99 * full["top1"], color=PALE_INK, linewidth=0.8, linestyle="--")
    axes.axvline(0.5 * full["prompt_tokens"], color=PALE_INK, linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.1 * max(row["prompt_tokens"] for _, row in rows))
    axes.set_xlabel("prompt tokens of a later turn (dashed: half of the full history)")
    axes.set_ylabel("top-1 agreement with the original (dashed: 0.99 of full history's)")
    _bare(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle("Agreement, and the prompt it takes", x=0.01, ha="left", fontweight="bold", color=INK)
    figure.savefig(path, dpi=130, format="png")
    return [path]


def _bare(axes: Any) -> None:
    axes.tick_params(length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#e6eaef", linewidth=0.8)
    axes.set_axisbelow(True)
