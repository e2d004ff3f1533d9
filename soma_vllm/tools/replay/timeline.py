"""The figure of a replay: one lane per session, one block per turn, coloured by who answered.

Drawn from the log alone, so that a log of another day gives the same figure. Holds no conversation text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from soma_vllm.tools.figures import BLUE, GREEN, INK, PALE_INK, PURPLE, RED, YELLOW, figure_file

COLORS = {"original": BLUE, "surrogate": YELLOW, "adapter": GREEN}
LABELS = {"original": "original", "surrogate": "surrogate", "adapter": "surrogate with its session's adapter"}
BLOCK = 0.90
"""Width of a turn's block, in turns."""
HEIGHT = 0.56
"""Height of a block, in lanes."""

_TRAINED = frozenset({"trained", "adapter_published", "training_failed"})
_MARKS: dict[str, dict[str, Any]] = {
    "switched": {"marker": ">", "color": INK, "markersize": 8, "label": "switch to the surrogate"},
    "rolled_back": {"marker": "X", "color": RED, "markersize": 11, "label": "roll back to the original"},
}
"""Events that stand between two turns."""

Turns = Sequence[Mapping[str, Any]]
Events = Sequence[Mapping[str, Any]]


def draw(log: Mapping[str, Any], path: Path) -> None:
    """Write the figure as a PNG.

    Args:
        log: what `soma_log.json` holds; at least one session has a turn.
        path: where to write; its directory exists.
    """
    sessions = {name: session for name, session in log["sessions"].items() if session["turns"]}
    longest = max(len(session["turns"]) for session in sessions.values())
    with figure_file(path, (10.5, 2.3 + 0.56 * len(sessions)), "Who answered each turn") as figure:
        axes = figure.add_subplot()
        for lane, session in enumerate(sessions.values()):
            turns, events = session["turns"], session.get("events") or []
            _draw_turns(axes, lane, turns)
            _draw_trainings(axes, lane, turns, events)
            for event in events:
                if event["kind"] in _MARKS:
                    # Between two turns, nearest after the moment: the next turn is the first to be affected.
                    border = sum(float(turn.get("at") or 0.0) <= float(event["at"]) for turn in turns) + 0.5
                    axes.plot(border, lane, **_MARKS[event["kind"]], markeredgecolor="white", zorder=6)
            axes.text(longest + 0.72, lane, _latencies(turns), va="center", ha="left", color=INK)
        _label(axes, sessions, longest, log.get("config", {}).get("warm_window"))
        handles, place = _legend(list(sessions.values())), "outside lower center"
        figure.legend(handles=handles, loc=place, ncols=3, frameon=False, handlelength=1.4, columnspacing=1.6)


def position(turns: Turns, at: float) -> float:
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


def trainings(events: Events) -> list[tuple[float, float | None]]:
    """When each training was submitted and when it ended, Unix seconds; None while it runs."""
    found: list[tuple[float, float | None]] = []
    begun: float | None = None
    for event in sorted(events, key=lambda event: float(event["at"])):
        if event["kind"] == "training_submitted":
            begun = float(event["at"])
        elif event["kind"] in _TRAINED and begun is not None:
            found.append((begun, float(event["at"])))
            begun = None
    return found if begun is None else [*found, (begun, None)]


def training_spans(turns: Turns, events: Events) -> list[tuple[float, float]]:
    """From where to where on the axis of turns each training ran."""
    last = float(turns[-1]["turn"]) + 0.5
    return [
        (position(turns, begun), last if ended is None else position(turns, ended))
        for begun, ended in trainings(events)
    ]


def _kind(turn: Mapping[str, Any]) -> str:
    """The key of `COLORS` for a turn."""
    return "adapter" if turn["engine"] == "surrogate" and turn.get("adapter") else str(turn["engine"])


def _is_outside(turn: Mapping[str, Any]) -> bool:
    """True when a switched session sent this turn to the original."""
    return bool(turn["engine"] == "original" and turn["phase"] == "SWITCHED")


def _draw_turns(axes: Any, lane: int, turns: Turns) -> None:
    from matplotlib.patches import FancyBboxPatch

    for turn in turns:
        kind, corner = _kind(turn), (turn["turn"] - BLOCK / 2 + 0.04, lane - HEIGHT / 2 + 0.04)
        look: dict[str, Any] = {"boxstyle": "round,pad=0.04,rounding_size=0.07", "facecolor": COLORS[kind]}
        axes.add_patch(FancyBboxPatch(corner, BLOCK - 0.08, HEIGHT - 0.08, linewidth=0, zorder=2, **look))
        if turn.get("gap") is not None:
            ink = INK if kind == "surrogate" else "white"
            axes.text(turn["turn"], lane, f"{turn['gap']:.2f}", color=ink, ha="center", va="center", zorder=4)
        if _is_outside(turn):
            axes.plot(turn["turn"] - 0.34, lane - 0.15, marker="D", color="white", markersize=4, zorder=4)


def _draw_trainings(axes: Any, lane: int, turns: Turns, events: Events) -> None:
    """A bar under the blocks, with its true length in seconds: on the axis of turns a pause has no width."""
    height = lane + HEIGHT / 2 + 0.13
    for (left, right), (begun, ended) in zip(training_spans(turns, events), trainings(events), strict=True):
        middle, half = (left + right) / 2, max(right - left, 0.34) / 2
        ends = [middle - half, middle + half]
        axes.plot(ends, [height] * 2, color=PURPLE, linewidth=3.2, solid_capstyle="round", zorder=5)
        if ended is not None:
            look = {"color": PURPLE, "fontsize": 8.5, "va": "center_baseline", "zorder": 5}
            axes.text(ends[1] + 0.08, height, f"{ended - begun:.0f} s", **look)


def _latencies(turns: Turns) -> str:
    parts = []
    for engine in ("original", "surrogate"):
        times = [float(turn["latency_s"]) for turn in turns if turn["engine"] == engine]
        parts.append(f"{median(times):.1f} s" if times else "–")
    return " → ".join(parts)


def _label(axes: Any, sessions: Mapping[str, Any], longest: int, warm_window: int | None) -> None:
    names = [name + "\n(adapter forced)" * bool(one.get("forced")) for name, one in sessions.items()]
    axes.set_yticks(range(len(sessions)), names)
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlim(0.4, longest + 0.6)
    axes.set_ylim(len(sessions) - 0.45, -0.62)
    axes.set_xlabel("turn")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    small = {"color": PALE_INK, "fontsize": 9, "va": "bottom"}
    if warm_window is not None:
        axes.axvspan(0.5, warm_window + 0.5, color="#eef2f7", linewidth=0, zorder=0)
        axes.text(0.58, -0.66, "warm start: the original answers", **small)
    axes.text(longest + 0.72, -0.66, "median time of an answer\noriginal → surrogate", **small)


def _legend(sessions: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Entries for what the figure shows, and for nothing else."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    turns = [turn for session in sessions for turn in session["turns"]]
    kinds = {event["kind"] for session in sessions for event in session.get("events") or ()}
    answered = {_kind(turn) for turn in turns}
    handles: list[Any] = [Patch(color=COLORS[key], label=LABELS[key]) for key in COLORS if key in answered]
    if "training_submitted" in kinds:
        label = "training in the background, seconds"
        handles.append(Line2D([], [], color=PURPLE, linewidth=3.2, label=label))
    marks = [{**mark, "markersize": 8} for kind, mark in _MARKS.items() if kind in kinds]
    if any(_is_outside(turn) for turn in turns):
        label = "question outside the locality, to the original"
        marks.append({"marker": "D", "color": "white", "markeredgecolor": INK, "markersize": 8, "label": label})
    if any(turn.get("gap") is not None for turn in turns):
        label = "audited gap between both answers, 0: alike"
        marks.append({"marker": "$0.1$", "color": INK, "markersize": 15, "label": label})
    return handles + [Line2D([], [], linestyle="none", **{"markeredgecolor": "none"} | mark) for mark in marks]
