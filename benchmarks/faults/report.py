"""The run as one JSON document, and its table on a terminal and in a document. Holds no conversation text."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from faults.row import MUST_BE_ZERO, Row
from soma_vllm.tools.command_line import write_json

HEADS = {
    "wrong_adapter": "wrong adapter",
    "lost_turns": "lost turns",
    "needless_5xx": "needless 5xx",
    "engine_deaths": "engine deaths",
    "leaks": "leaks",
}

SEEN_WHERE = (
    "A wrong adapter can be seen where adapters have marks of their own (files, servers, kills, soak), an "
    "engine's death where engines are real (files, originals, servers, kills); elsewhere both are zero anyway."
)


class Kept:
    """The parts that were played so far, in a file: a part played again replaces itself."""

    def __init__(self, path: Path | None, machine: Mapping[str, Any], kinds: Sequence[str]) -> None:
        """`kinds` of faults that there are."""
        self._path = path
        there = path is not None and path.exists()
        self.document: dict[str, Any] = json.loads(path.read_text()) if there and path else {"parts": {}}
        self.document["kinds"] = list(kinds)
        self._machine = machine

    def add(self, name: str, rows: Sequence[Row], seconds: float, command: str) -> None:
        """Keep a part."""
        self.document["parts"][name] = {
            "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
            "command": command,
            "seconds": round(seconds, 1),
            "machine": dict(self._machine),
            "rows": [row.document() for row in rows],
        }
        if self._path is not None:
            write_json(self._path, self.document)


def rows_of(document: Mapping[str, Any]) -> list[Row]:
    """Every row of a document."""
    return [Row.of(row) for part in document["parts"].values() for row in part["rows"]]


def show(rows: Sequence[Row], console: Console) -> None:
    """Print rows, and what was wrong in words."""
    grid = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, header_style="bold")
    for head in ("fault", "requests", *HEADS.values(), "MiB", "s", ""):
        grid.add_column(head, justify="left" if head in ("fault", "") else "right")
    for row in rows:
        grid.add_row(*_cells(row), "" if row.fine else "FAILED")
    console.print(grid)
    for row in rows:
        for line in (*row.found, *([row.broken] if row.broken else [])):
            console.print(f"{row.name}: {line}", markup=False, highlight=False)


def markdown(document: Mapping[str, Any]) -> str:
    """Every part's table, with the command, the date and the machine."""
    parts = document["parts"].values()
    if not parts:
        return ""
    days = sorted({part["date"] for part in parts})
    machine = next(iter(parts))["machine"]
    commands = ", ".join(f"`{command}`" for command in dict.fromkeys(part["command"] for part in parts))
    alone = any(kind not in document["parts"] for kind in document["kinds"])
    played = f"Played by {commands}{' kind by kind' if alone else ''}"
    rows, minutes = rows_of(document), sum(part["seconds"] for part in parts) / 60
    lines = [
        f"{played}; the first kind ended on {days[0]}, the last on {days[-1]} (UTC); on "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, shared with "
        f"other work: {sum(row.requests for row in rows):,} requests; the kinds took {minutes:.0f} minutes "
        f"together. {SEEN_WHERE}",
        "",
        "| fault: step | requests | " + " | ".join(HEADS.values()) + " | MiB | what it cost |",
        "|---|" + "---:|" * (len(HEADS) + 2) + "---|",
    ]
    for row in rows:
        cost = ", ".join(f"{what}: {times}" for what, times in row.noted.items() if times)
        told = row.broken or (f"not played: {row.skipped}" if row.skipped else cost)
        lines.append("| " + " | ".join([*_cells(row)[:-1], told]) + " |")
    if missing := [f"`{kind}`" for kind in document["kinds"] if kind not in document["parts"]]:
        lines += ["", f"Not played in this run: {', '.join(missing)}."]
    return "\n".join([*lines, ""])


def _cells(row: Row) -> list[str]:
    figures = ["-" if row.skipped else str(getattr(row, figure)) for figure in MUST_BE_ZERO]
    memory = "" if row.memory_mib is None else f"{row.memory_mib:.0f}"
    return [row.name, str(row.requests), *figures, memory, f"{row.seconds:.0f}"]
