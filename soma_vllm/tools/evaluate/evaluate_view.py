"""An evaluation as it is shown: progress, and the table of variants. No query or answer is ever shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from soma_vllm.tools.command_line import frameless, say
from soma_vllm.tools.evaluate.statistics import LEAST_PAIRS


class Steps:
    """The terminal: a bar where there is one, else a line per step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._done = 0
        self._total = 0

    def say(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        say(self._console, text)

    @contextmanager
    def counting(self, total: int) -> Iterator[None]:
        """Show how many of `total` steps have begun while the block runs."""
        self._total = total
        if not self._console.is_terminal:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._bar.add_task("measuring", total=total)
            try:
                yield
            finally:
                self._bar = None

    def step(self, session: str, variant: str) -> None:
        """Show what is measured now."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], description=f"{session} {variant}", completed=self._done)
        else:
            self.say(f"{self._done + 1}/{self._total} {session} {variant}")
        self._done += 1


def table(document: Mapping[str, Any]) -> Group:
    """One row per variant, one for what the gate chose, and what the columns mean."""
    grid = frameless()
    grid.add_column("variant", overflow="fold")
    headings = ("NLL", "minus baseline [95 %]", "KL", "top-1", "gap", "ROUGE-L", "prompt\ntokens", "train\ns")
    for heading in headings:
        grid.add_column(heading, justify="right", no_wrap=True)
    for name, row in document["variants"].items():
        failed = f" ({len(row['failed'])} failed)" if row["failed"] else ""
        grid.add_row(name + failed, *_cells(row))
    summary = document["chosen_summary"]
    count = ", ".join(f"{number} {candidate}" for candidate, number in summary["sessions"].items())
    grid.add_section()
    grid.add_row(f"chosen ({count})", *_cells(summary))
    sessions, warm = len(document["chosen"]), document["settings"]["warm_window"]
    legend = (
        f"{sessions} sessions, turns after turn {warm} only; means over sessions. "
        "baseline: plain under the same prefix; for plain and for chosen, plain@full.\n"
        "chosen: sessions that the gate gives to the surrogate; the original keeps the others. "
        f"Fewer than {LEAST_PAIRS} sessions have no interval."
    )
    return Group(grid, Text(legend, style="dim"))


def _cells(row: Mapping[str, Any]) -> list[str]:
    columns = {"kl": 3, "top1": 3, "gap": 3, "rouge_l": 3, "prompt_tokens": 0, "train_s": 1}
    numbers = (_number(row[name], digits) for name, digits in columns.items())
    return [_number(row["nll"], 3), _difference(row), *numbers]


def _difference(row: Mapping[str, Any]) -> str:
    if row["diff_nll"] is None:
        return "–"
    if row["ci95_nll"] is None:
        return f"{row['diff_nll']:+.3f}"
    low, high = row["ci95_nll"]
    return f"{row['diff_nll']:+.3f} [{low:+.3f}, {high:+.3f}]"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
