"""The study's tables for people, on a terminal and in a document, from its JSON alone."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from marked import replace_marked
from rich import box
from rich.console import Console
from rich.table import Table

from study import outcome_table
from study.report import OVERHEADS


def show(document: Mapping[str, Any], console: Console) -> None:
    """Print what was measured, and what it comes to."""
    settings, arms = document["settings"], document["arms"]
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    grid.add_column("")
    for arm in arms:
        grid.add_column(arm, justify="right")
    for heading, cell in ROWS:
        grid.add_row(heading, *(cell(arm) for arm in arms.values()))
    promise, tariff = settings["promise"], settings["tariffs"][0]
    console.print(
        f"{settings['original']} over {settings['surrogate']}; {settings['repeats']} repeats of "
        f"{settings['sessions']} sessions; later turns are those after turn {settings['warm_window']}",
        highlight=False,
    )
    console.print(grid)
    console.print(f"fidelity: the gate promises {promise:.2f} for what it gives to the surrogate")
    console.print(f"net cost: per session, tariff {tariff}; seconds are {settings['seconds_are']}")
    console.print(_costs(document))
    for title, heads, rows in outcome_table.grids(document):
        console.print(_grid_of(title, heads, rows))
    for line in _ranking_lines(document):
        console.print(line, highlight=False)
    for name, value in _ratio_rows(document):
        console.print(f"{name:34} {value}", highlight=False)


def _grid_of(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    told = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold", title=title)
    for number, head in enumerate(heads):
        told.add_column(head, justify="right" if number else "left")
    for row in rows:
        told.add_row(*row)
    return told


def _costs(document: Mapping[str, Any]) -> Table:
    """Net cost and break-even turn under every tariff."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    grid.add_column("net cost / N*")
    for arm in document["arms"]:
        grid.add_column(arm, justify="right")
    for name, cells in _cost_rows(document):
        grid.add_row(name, *cells)
    return grid


def _cost_rows(document: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    rows = []
    for name, curves in document["costs"].items():
        cells = []
        for curve in curves.values():
            even = curve["break_even"]
            turn = "" if even is None else f" / {_even(even)}"
            cells.append(f"{curve['by_length'][-1]:.4g}{turn}")
        rows.append((name, cells))
    return rows


def _ratio_rows(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The ratios, with their intervals where they have one."""
    rows = {name: "-" if value is None else str(value) for name, value in document["ratios"].items()}
    for name, spread in document.get("intervals", {}).items():
        if spread is not None:
            rows[name] += f" [{spread[0]}, {spread[1]}]"
    if document["overhead"] is not None and "intervals" not in document:
        for name, (over, way) in OVERHEADS.items():
            low, high = document["overhead"][over][way]["ci95"]
            rows[name] += f" [{low}, {high}]"
    return list(rows.items())


def _ranking_lines(document: Mapping[str, Any]) -> list[str]:
    """What each repeat, with its own order of arms, says of their later turns."""
    return [
        f"repeat {number}, played {', '.join(found['played'])}: later turns fastest under "
        f"{', then '.join(found['ranked'])}"
        for number, found in enumerate(document["rankings"], start=1)
    ]


def rewrite(path: Path, document: Mapping[str, Any], figures: Sequence[Path] = (), name: str = "") -> None:
    """Put the tables, and links to figures, into a document, between its two marks, or those of another `name`.

    Raises:
        ValueError: it has no such marks.
    """
    links = [
        f"![{figure.stem.replace('_', ' ')}]({os.path.relpath(figure, path.parent)})" for figure in figures
    ]
    made = "\n".join([markdown(document), *(f"{link}\n" for link in links)])
    replace_marked(path, f"study {name}" if name else "study", made)


def markdown(document: Mapping[str, Any]) -> str:
    """Run and tables, in Markdown."""
    settings, arms = document["settings"], document["arms"]
    machine, dialogues, targets = settings["machine"], settings["dialogues"], settings["targets"]
    lines = [
        f"Begun {settings['begun']} on {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, load average {machine['load_average'][0]} before it. "
        f"{settings['original']} over {settings['surrogate']}; {settings['repeats']} repeats of "
        f"{settings['sessions']} sessions of `{dialogues['source']}`, "
        f"{min(dialogues['turns'].values())} turns or more; answers of at most {settings['max_tokens']} "
        f"tokens, a session every {settings['arrival']:g} s, {settings['think']:g} s to think, "
        f"seed {settings['seed']}. Seconds are {settings['seconds_are']}; the target is a first token "
        f"within {targets['ttft_s']:g} s and an answer within {targets['latency_s']:g} s.",
        "",
        *_grid(["", *arms], [[heading, *(cell(arm) for arm in arms.values())] for heading, cell in ROWS]),
        "",
        *(
            line
            for title, heads, rows in outcome_table.grids(document)
            for line in (f"{title.capitalize()}:", "", *_grid(heads, rows), "")
        ),
        *_grid(["net cost / N\\*", *arms], [[name, *cells] for name, cells in _cost_rows(document)]),
        "",
        *_grid(
            ["", "value"],
            _ratio_rows(document),
        ),
        "",
        *(f"* {line}" for line in _ranking_lines(document)),
        "",
    ]
    return "\n".join(lines)


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(heads) - 1)
    return ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in (heads, rule, *rows)]


def _even(even: Mapping[str, Any]) -> str:
    if even["turn"] is None:
        return "never"
    return f"~{even['turn']:.0f}" if even["extrapolated"] else f"{even['turn']:.0f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _three(found: Mapping[str, float | None], digits: int = 2) -> str:
    return " / ".join(_number(found[name], digits) for name in ("p50", "p90", "p99"))


def _tokens(arm: Mapping[str, Any], engine: str) -> str:
    found = arm["engine_tokens"][engine]
    return f"{found['prompt']:,} / {found['cached']:,} / {found['generated']:,}"


def _fidelity(arm: Mapping[str, Any]) -> str:
    own = arm["agreement"].get("against_its_own_repeat")
    return _number(arm["fidelity"], 3) + (f" (itself again {own['fidelity']:.3f})" if own else "")


def _trained(arm: Mapping[str, Any]) -> str:
    mean = arm["training_s_mean"]
    return str(arm["adapters_trained"]) + (f" of {mean:.1f} s" if mean is not None else "")


def _seconds(arm: Mapping[str, Any], part: str) -> str:
    return _number(arm["seconds_per_session"][part], 1)


ROWS = (
    ("first token, s, p50/90/99", lambda arm: _three(arm["ttft_s"])),
    ("between tokens, s", lambda arm: _three(arm["token_s"], 3)),
    ("turn, s", lambda arm: _three(arm["latency_s"])),
    ("later turn, s", lambda arm: _three(arm["later_latency_s"])),
    ("  switched ones over the original's", lambda arm: _number(arm["switched_latency_over_original"])),
    ("turns a second", lambda arm: _number(arm["turns_per_s"], 3)),
    ("  of these within the target", lambda arm: _number(arm["goodput_turns_per_s"], 3)),
    ("share of the surrogate", lambda arm: f"{arm['share_surrogate']:.0%}"),
    ("  of later turns", lambda arm: f"{arm['share_surrogate_later']:.0%}"),
    ("first switched turn, median", lambda arm: _number(arm["median_switch_turn"], 0)),
    ("fidelity", _fidelity),
    ("  of surrogate's turns", lambda arm: _number(arm["agreement"]["fidelity_of_surrogate_turns"], 3)),
    ("  ROUGE-L", lambda arm: _number(arm["agreement"]["rouge_l"], 3)),
    ("original: in/cached/out", lambda arm: _tokens(arm, "original")),
    ("surrogate: in/cached/out", lambda arm: _tokens(arm, "surrogate")),
    ("adapters trained", _trained),
    ("seconds a session: turns", lambda arm: _seconds(arm, "turns")),
    ("  audits", lambda arm: _seconds(arm, "audits")),
    ("  acceptance", lambda arm: _seconds(arm, "acceptance")),
    ("  training", lambda arm: _seconds(arm, "training")),
    ("  server", lambda arm: _seconds(arm, "server")),
    ("net cost of a session", lambda arm: _number(arm["net_cost"], 3)),
)
