"""The two figures of an evaluation, drawn from its JSON alone: a report of another day gives the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soma_vllm.tools.evaluate.statistics import LEAST_PAIRS
from soma_vllm.tools.evaluate.variants import METHODS
from soma_vllm.tools.figures import BLUE, GREEN, PALE_INK, YELLOW, draw_frame, figure_file

COLORS = {"full": BLUE, "anchored": GREEN, "sliding": YELLOW}
"""By prefix."""
MARKERS = dict(zip(METHODS, "osD^vP*", strict=True))
"""By method."""


def draw(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the figures that the document has numbers for; their paths."""
    paths = []
    rows = [(name, row) for name, row in document["variants"].items() if row["diff_nll"] is not None]
    if rows:
        paths.append(out / "nll.png")
        title = f"Change on later turns (bar: 95 % interval, from {LEAST_PAIRS} sessions on; ticks: sessions)"
        with figure_file(paths[-1], (8.5, 1.6 + 0.42 * len(rows)), title) as figure:
            _draw_differences(figure.add_subplot(), rows, document["variants"])
    variants = document["variants"]
    if variants and all(row["top1"] is not None for row in variants.values()):
        paths.append(out / "top1.png")
        with figure_file(paths[-1], (8.5, 5.2), "Agreement, and the prompt it takes") as figure:
            _draw_agreement(figure.add_subplot(), variants)
            figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return paths


def _draw_differences(axes: Any, rows: list[tuple[str, Any]], variants: Mapping[str, Any]) -> None:
    """NLL of each variant minus its baseline's, with the interval over sessions."""
    axes.axvline(0.0, color=PALE_INK, linewidth=1)
    for lane, (_, row) in enumerate(rows):
        color = COLORS[row["prefix"]]
        axes.plot(row["ci95_nll"] or [row["diff_nll"]] * 2, [lane] * 2, color=color, linewidth=3)
        axes.plot(row["diff_nll"], lane, marker="o", color=color, markeredgecolor="white", markersize=8)
        baseline = variants[row["against"]]["sessions"]
        each = [numbers["nll"] - baseline[session]["nll"] for session, numbers in row["sessions"].items()]
        axes.plot(each, [lane + 0.22] * len(each), marker="|", linestyle="none", color=color, alpha=0.6)
    axes.set_yticks(range(len(rows)), [f"{name}\nagainst {row['against']}" for name, row in rows], fontsize=8.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("NLL minus the baseline's, nats per token of the original's later answers; left is better")
    draw_frame(axes, "x")


def _draw_agreement(axes: Any, variants: Mapping[str, Any]) -> None:
    """Agreement against what the surrogate has to read for it."""
    for name, row in sorted(variants.items(), key=lambda pair: -pair[1]["top1"]):
        look = {"marker": MARKERS[row["method"]], "color": COLORS[row["prefix"]], "linestyle": "none"}
        label = f"{row['top1']:.3f}  {name}"
        axes.plot(
            row["prompt_tokens"], row["top1"], markeredgecolor="white", markersize=10, label=label, **look
        )
    full = variants["plain@full"]
    axes.axhline(0.99 * full["top1"], color=PALE_INK, linewidth=0.8, linestyle="--")
    axes.axvline(0.5 * full["prompt_tokens"], color=PALE_INK, linewidth=0.8, linestyle="--")
    axes.set_xlim(0, 1.1 * max(row["prompt_tokens"] for row in variants.values()))
    axes.set_xlabel("prompt tokens of a later turn (dashed: half of the full history)")
    axes.set_ylabel("top-1 agreement with the original (dashed: 0.99 of full history's)")
    draw_frame(axes, "x")
