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
PALE_INK = "#66707c"
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
    with mpl.rc_context({"font.family": "DejaVu Sans", "font.size": 10}):
        figure = Figure(figsize=(10.5, 2.3 + 0.56 * len(sessions)), layout="constrained")
        axes = figure.add_subplot()
        for lane, session in enumerate(sessions.values()):
            _lane(axes, lane, session, longest)
        _frame(axes, list(sessions.items()), longest, log.get("config", {}).get("warm_window"))
        figure.suptitle("Who answered each turn", x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
        figure.legend(
            handles=_legend(list(sessions.values())),
            loc="outside lower center",
            ncols=3,
            frameon=False,
            handlelength=1.4,
            columnspacing=1.6,
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
    last = float(turns[-1]["turn"]) + 0.5
    return [
        (position(turns, begun), last if ended is None else position(turns, ended))
        for begun, ended in trainings(events)
    ]


def trainings(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float | None]]:
    """When each training was submitted and when it ended, Unix seconds; None while it runs."""
    found: list[tuple[float, float | None]] = []
    begun: float | None = None
    for event in sorted(events, key=lambda event: float(event["at"])):
        if event["kind"] == "training_submitted":
            begun = float(event["at"])
        elif event["kind"] in _TRAINED and begun is not None:
            found.append((begun, float(event["at"])))
            begun = None
    if begun is not None:
        found.append((begun, None))
    return found


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
    _training(axes, lane, turns, events)
    _markers(axes, lane, turns, events)
    axes.text(longest + 0.72, lane, _latencies(turns), va="center", ha="left", color=INK)


def _training(
    axes: Any, lane: int, turns: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> None:
    """A bar under the blocks, with its true length in seconds: on the axis of turns a pause has no width."""
    height = lane + HEIGHT / 2 + 0.13
    for (begin, end), (begun, ended) in zip(training_spans(turns, events), trainings(events), strict=True):
        middle, width = (begin + end) / 2, max(end - begin, 0.34)
        axes.plot(
            [middle - width / 2, middle + width / 2],
            [height] * 2,
            color=TRAINING,
            linewidth=3.2,
            solid_capstyle="round",
            zorder=5,
        )
        if ended is not None:
            axes.text(
                middle + width / 2 + 0.08,
                height,
                f"{ended - begun:.0f} s",
                color=TRAINING,
                fontsize=8.5,
                va="center_baseline",
                zorder=5,
            )


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
        if _is_outside(turn):
            axes.plot(turn["turn"] - 0.34, lane - 0.15, marker="D", color="white", markersize=4, zorder=4)


def _between(turns: Sequence[Mapping[str, Any]], at: float) -> float:
    """The border between two turns that lies nearest after a moment: the next turn is the first to feel it."""
    return sum(1 for turn in turns if float(turn.get("at") or 0.0) <= at) + 0.5


def _latencies(turns: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for engine in ("original", "surrogate"):
        times = [float(turn["latency_s"]) for turn in turns if turn["engine"] == engine]
        parts.append(f"{median(times):.1f} s" if times else "–")
    return " → ".join(parts)


def _frame(axes: Any, sessions: Sequence[tuple[str, Any]], longest: int, warm_window: int | None) -> None:
    names = [name + ("\n(adapter forced)" if session.get("forced") else "") for name, session in sessions]
    axes.set_yticks(range(len(sessions)), names)
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlim(0.4, longest + 0.6)
    axes.set_ylim(len(sessions) - 0.45, -0.62)
    axes.set_xlabel("turn")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if warm_window is not None:
        axes.axvspan(0.5, warm_window + 0.5, color="#eef2f7", linewidth=0, zorder=0)
        axes.text(0.58, -0.66, "warm start: the original answers", color=PALE_INK, fontsize=9, va="bottom")
    axes.text(
        longest + 0.72,
        -0.66,
        "median time of an answer\noriginal → surrogate",
        fontsize=9,
        va="bottom",
        color=PALE_INK,
    )


def _legend(sessions: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What the figure holds, and nothing it does not hold."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    turns = [turn for session in sessions for turn in session["turns"]]
    kinds = {event["kind"] for session in sessions for event in session.get("events") or ()}
    answered = {who(turn) for turn in turns}
    labels = {
        "original": "original",
        "surrogate": "surrogate",
        "adapter": "surrogate with its session's adapter",
    }
    handles: list[Any] = [Patch(color=COLORS[key], label=labels[key]) for key in COLORS if key in answered]
    if "training_submitted" in kinds:
        label = "training in the background, seconds"
        handles.append(Line2D([], [], color=TRAINING, linewidth=3.2, label=label))
    if "switched" in kinds:
        handles.append(_mark(">", INK, "switch to the surrogate"))
    if "rolled_back" in kinds:
        handles.append(_mark("X", ROLLBACK, "roll back to the original"))
    if any(_is_outside(turn) for turn in turns):
        handles.append(_mark("D", "white", "question outside the locality, to the original", edge=INK))
    if any(turn.get("gap") is not None for turn in turns):
        handles.append(_mark("$0.1$", INK, "audited gap between both answers, 0: alike", size=15))
    return handles


def _mark(marker: str, color: str, label: str, edge: str = "none", size: float = 8) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        marker=marker,
        color=color,
        markeredgecolor=edge,
        linestyle="none",
        markersize=size,
        label=label,
    )


def _is_outside(turn: Mapping[str, Any]) -> bool:
    """True when a switched session sent this turn to the original."""
    return bool(turn["engine"] == "original" and turn["phase"] == "SWITCHED")
