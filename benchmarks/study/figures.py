"""The study's figures, drawn from its JSON alone: latency by turn, cost by length, fidelity, accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from soma_vllm.tools.figures import BLUE, GREEN, INK, PALE_INK, PURPLE, RED, YELLOW, draw_frame, figure_file

COLORS = {
    "original": BLUE,
    "surrogate": YELLOW,
    "soma": GREEN,
    "history_prefix": PURPLE,
    "history_ft": RED,
    "llmlingua2": "#3aa6b5",
    "routellm": "#b5733a",
    "speculative": "#7a7f86",
    "original_one_core": "#8fb3e0",
    "switch_all": "#d9a441",
    "random": "#c9b79c",
    "soma_paper": "#1f7a52",
}
OTHERS = "#a0a6ad"


def draw(document: Mapping[str, Any], out: Path) -> list[Path]:
    """Write the figures; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    drawings = {
        "latency_by_turn": ("Latency of a turn", _latency),
        "cost_by_length": ("What a session has cost", _cost),
        "fidelity_and_cost": ("Fidelity against cost: up and to the left is better", _frontier),
    }
    if any(arm.get("sessions_told", {}).get("graded_turns") for arm in document["arms"].values()):
        drawings["accuracy_and_cost"] = ("Right answers against cost: up and to the left is better", _accuracy)
    for name, (title, drawing) in drawings.items():
        with figure_file(out / f"{name}.png", (8.5, 4.6), title) as figure:
            axes = figure.add_subplot()
            drawing(document, axes)
            draw_frame(axes, "y")
    return [out / f"{name}.png" for name in drawings]


def _color(arm: str) -> str:
    return COLORS.get(arm, OTHERS)


def _latency(document: Mapping[str, Any], axes: Any) -> None:
    for name, arm in document["arms"].items():
        rows = arm["by_turn"]
        turns = [row["turn"] for row in rows]
        middle = [row["latency_s"]["p50"] for row in rows]
        axes.fill_between(
            turns,
            middle,
            [row["latency_s"]["p90"] for row in rows],
            color=_color(name),
            alpha=0.12,
            linewidth=0,
        )
        axes.plot(turns, middle, color=_color(name), linewidth=2, label=name)
        switch = arm["median_switch_turn"]
        if switch is not None and switch > 1:
            switch = min(round(switch), len(middle))
            value = middle[switch - 1]
            axes.plot(switch, value, "o", color=_color(name), markeredgecolor="white", markersize=9)
            axes.annotate(
                "switch",
                (switch, value),
                (0, 9),
                textcoords="offset points",
                ha="center",
                color=INK,
                fontsize=8,
            )
    _warm(document, axes)
    axes.set_xlabel("turn")
    axes.set_ylabel("latency, seconds (line: median, shade: to p90)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, ncols=3)


def _cost(document: Mapping[str, Any], axes: Any) -> None:
    tariff = next(iter(document["costs"]))
    curves = document["costs"][tariff]
    for name, curve in curves.items():
        lengths = range(1, len(curve["by_length"]) + 1)
        axes.plot(lengths, curve["by_length"], color=_color(name), linewidth=2, label=name)
    even = curves.get("soma", {}).get("break_even")
    if even and even["turn"] is not None:
        axes.axvline(even["turn"], color=_color("soma"), linewidth=1, linestyle="--")
        carried = ", carried on beyond what was played" if even["extrapolated"] else ""
        axes.set_title(
            f"soma breaks even at turn {even['turn']:.0f}{carried}", loc="left", fontsize=9, color=PALE_INK
        )
    _warm(document, axes)
    axes.set_xlabel("turns of the session")
    axes.set_ylabel(f"net cost so far (tariff {tariff})")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _frontier(document: Mapping[str, Any], axes: Any) -> None:
    arms = document["arms"]
    points = {name: (arm["net_cost"], arm["fidelity"]) for name, arm in arms.items()}
    best, frontier = float("-inf"), []
    for cost, fidelity in sorted(points.values(), key=lambda point: (point[0], -point[1])):
        if fidelity > best:
            best = fidelity
            frontier.append((cost, fidelity))
    axes.plot(*zip(*frontier, strict=True), color=PALE_INK, linewidth=1, linestyle="--")
    for name, (cost, fidelity) in points.items():
        axes.plot(cost, fidelity, "o", color=_color(name), markeredgecolor="white", markersize=11)
        axes.annotate(name, (cost, fidelity), (8, -3), textcoords="offset points", color=INK)
    promise = document["settings"]["promise"]
    axes.axhline(promise, color=COLORS["soma"], linewidth=1, linestyle=":")
    axes.text(0, promise, " the gate's promise", va="bottom", fontsize=8, color=PALE_INK)
    own = arms["original"]["agreement"].get("against_its_own_repeat")
    if own:
        axes.axhline(own["fidelity"], color=COLORS["original"], linewidth=1, linestyle=":")
        axes.text(0, own["fidelity"], " the original, played again", va="bottom", fontsize=8, color=PALE_INK)
    axes.set_xlim(0, 1.25 * max(cost for cost, _ in points.values()) or 1.0)
    axes.set_xlabel(f"net cost of a session (tariff {next(iter(document['costs']))})")
    axes.set_ylabel("fidelity on later turns: 1 - gap to the original's answers")


def _accuracy(document: Mapping[str, Any], axes: Any) -> None:
    for name, arm in document["arms"].items():
        told = arm["sessions_told"]
        cost, right, spread = told["cost"], told["task_accuracy"], told["intervals"]["task_accuracy"]
        if right is not None:
            if spread is not None:
                axes.plot([cost, cost], spread, color=_color(name), linewidth=1)
            axes.plot(cost, right, "o", color=_color(name), markeredgecolor="white", markersize=11)
            axes.annotate(name, (cost, right), (8, -3), textcoords="offset points", color=INK)
    axes.set_xlim(0, 1.25 * max(arm["sessions_told"]["cost"] for arm in document["arms"].values()) or 1.0)
    axes.set_xlabel(f"net cost of a session (tariff {next(iter(document['costs']))})")
    axes.set_ylabel("share of right turns (bars: 95 %, over dialogues)")


def _warm(document: Mapping[str, Any], axes: Any) -> None:
    axes.axvspan(0.5, document["settings"]["warm_window"] + 0.5, color="#eef1f5", zorder=0, linewidth=0)
    axes.set_xlim(left=0.5)
