"""The figure of a replay: one lane per session, one block per turn, coloured by who answered.

Drawn from the log alone, so that a log of another day gives the same figure. Holds no conversation text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

COLORS = {"original": "#3b6ea8", "surrogate": "#f2b84b", "adapter": "#4fa36c"}
INK = "#22262b"
TRAINING = "#8a5fb5"
ROLLBACK = "#cf3a3a"
BLOCK = 0.90
"""Width of a turn's block, in turns."""
HEIGHT = 0.56
"""Height of a block, in lanes."""

_TRAINED = frozenset({"trained", "adapter_published", "training_failed"})


def draw(log: Mapping[str, Any], path: Path) -> None:
    """Write the figure as a PNG.

    Args:
        log: what `soma_log.json` holds; at least one session has a turn.
        path: where to write; its directory exists.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sessions = {name: session for name, session in log["sessions"].items() if session["turns"]}
    longest = max(len(session["turns"]) for session in sessions.values())
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 9}):
        figure = Figure(figsize=(11, 1.7 + 0.52 * len(sessions)), layout="constrained")
        axes = figure.add_subplot()
        for lane, session in enumerate(sessions.values()):
            _lane(axes, lane, session, longest)
        _frame(axes, list(sessions.items()), longest, log.get("config", {}).get("warm_window"))
        figure.legend(
            handles=_legend(), loc="outside lower center", ncols=4, frameon=False, handlelength=1.4, fontsize=9
        )
        figure.savefig(path, dpi=130, format="png")


def who(turn: Mapping[str, Any]) -> str:
    """The key of `COLORS` for a turn."""
    if turn["engine"] == "surrogate" and turn.get("adapter"):
        return "adapter"
    return str(turn["engine"])


def position(turns: Sequence[Mapping[str, Any]], at: float) -> float:
    """Where a moment lies on the axis of turns.

    Turn n covers [n - BLOCK/2, n + BLOCK/2] between its question and its last token; waiting between two turns
    fills the space between their blocks.
    """
    starts = [float(turn.get("at") or 0.0) for turn in turns]
    index = bisect_right(starts, at) - 1
    if index < 0:
        return 0.5
    start, latency = starts[index], float(turns[index]["latency_s"])
    number = float(turns[index]["turn"])
    if latency > 0 and at <= start + latency:
        return number - BLOCK / 2 + BLOCK * (at - start) / latency
    return number + 0.5


def training_spans(
    turns: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> list[tuple[float, float]]:
    """From where to where on the axis of turns a training ran, for each of them."""
    spans = []
    begun: float | None = None
    for event in sorted(events, key=lambda event: float(event["at"])):
        if event["kind"] == "training_submitted":
            begun = position(turns, float(event["at"]))
        elif event["kind"] in _TRAINED and begun is not None:
            spans.append((begun, position(turns, float(event["at"]))))
            begun = None
    if begun is not None:
        spans.append((begun, turns[-1]["turn"] + 0.5))
    return spans


def _lane(axes: Any, lane: int, session: Mapping[str, Any], longest: int) -> None:
    from matplotlib.patches import FancyBboxPatch

    turns, events = session["turns"], session.get("events") or []
    for turn in turns:
        kind = who(turn)
        axes.add_patch(
            FancyBboxPatch(
                (turn["turn"] - BLOCK / 2 + 0.04, lane - HEIGHT / 2 + 0.04),
                BLOCK - 0.08,
                HEIGHT - 0.08,
                boxstyle="round,pad=0.04,rounding_size=0.07",
                facecolor=COLORS[kind],
                linewidth=0,
                zorder=2,
            )
        )
        if turn.get("gap") is not None:
            ink = INK if kind == "surrogate" else "white"
            axes.text(turn["turn"], lane, f"{turn['gap']:.2f}", color=ink, ha="center", va="center", zorder=4)
    for begin, end in training_spans(turns, events):
        middle, width = (begin + end) / 2, max(end - begin, 0.34)
        axes.plot(
            [middle - width / 2, middle + width / 2],
            [lane + HEIGHT / 2 + 0.11] * 2,
            color=TRAINING,
            linewidth=3.2,
            solid_capstyle="round",
            zorder=5,
        )
    _markers(axes, lane, turns, events)
    axes.text(longest + 0.72, lane, _latencies(turns), va="center", ha="left", color=INK)


def _markers(
    axes: Any, lane: int, turns: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> None:
    """Switches and roll backs stand between two turns, a locality miss on its turn."""
    for event in events:
        if event["kind"] == "switched":
            place = _between(turns, float(event["at"]))
            axes.plot(place, lane, marker=">", color=INK, markersize=8, markeredgecolor="white", zorder=6)
        elif event["kind"] == "rolled_back":
            place = _between(turns, float(event["at"]))
            axes.plot(place, lane, marker="X", color=ROLLBACK, markersize=11, markeredgecolor="white", zorder=6)
    for turn in turns:
        if turn["engine"] == "original" and turn["phase"] == "SWITCHED":
            axes.plot(turn["turn"], lane, marker="D", color="white", markersize=5, zorder=4)


def _between(turns: Sequence[Mapping[str, Any]], at: float) -> float:
    """The border between two turns that lies nearest after a moment: the next turn is the first to feel it."""
    return sum(1 for turn in turns if float(turn.get("at") or 0.0) <= at) + 0.5


def _latencies(turns: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for engine in ("original", "surrogate"):
        times = [float(turn["latency_s"]) for turn in turns if turn["engine"] == engine]
        if times:
            parts.append(f"{median(times):.1f} s")
    return " → ".join(parts)


def _frame(axes: Any, sessions: Sequence[tuple[str, Any]], longest: int, warm_window: int | None) -> None:
    names = [name + (" (forced)" if session.get("forced") else "") for name, session in sessions]
    axes.set_yticks(range(len(sessions)), names)
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlim(0.4, longest + 0.6)
    axes.set_ylim(len(sessions) - 0.45, -0.62)
    axes.set_xlabel("turn")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if warm_window is not None:
        axes.axvspan(0.5, warm_window + 0.5, color="#eef2f7", linewidth=0, zorder=0)
        axes.text(0.58, -0.66, "warm start", color="#66707c", fontsize=8.5, va="bottom")
    axes.text(
        longest + 0.72,
        -0.66,
        "median latency\noriginal → surrogate",
        fontsize=8.5,
        va="bottom",
        color="#66707c",
    )


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def mark(marker: str, color: str, label: str, edge: str = "none") -> Any:
        return Line2D(
            [],
            [],
            marker=marker,
            color=color,
            markeredgecolor=edge,
            linestyle="none",
            markersize=8,
            label=label,
        )

    return [
        Patch(color=COLORS["original"], label="original"),
        Patch(color=COLORS["surrogate"], label="surrogate"),
        Patch(color=COLORS["adapter"], label="surrogate + adapter"),
        Line2D([], [], color=TRAINING, linewidth=3.2, label="training in the background"),
        mark(">", INK, "switch"),
        mark("X", ROLLBACK, "roll back"),
        mark("D", "white", "outside the locality", edge=INK),
        mark("$0.1$", INK, "audited gap"),
    ]
