"""The registry of faults, and the run: each fault once, its rows kept as soon as it is over."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.row import Row, timed

Play = Callable[["Scene"], None]


@dataclass
class Scene:
    """What a fault is played with. `quick` plays fewer of everything."""

    quick: bool
    folder: Path
    held: ExitStack
    """Closed when the run ends."""
    shared: dict[str, Any]
    """What one fault leaves to the next: servers that run."""
    rows: list[Row] = field(default_factory=list)

    def row(self, fault: str, step: str) -> Row:
        """A new row."""
        self.rows.append(Row(fault, step))
        return self.rows[-1]

    def new_folder(self) -> Path:
        """An empty folder."""
        return Path(tempfile.mkdtemp(dir=self.folder))


@dataclass(frozen=True)
class Fault:
    """A kind of fault. `play` makes rows of the scene."""

    name: str
    play: Play


def play(faults: Sequence[Fault], *, quick: bool = False) -> Iterator[tuple[Fault, list[Row]]]:
    """Each fault with its rows, when it is over."""
    with tempfile.TemporaryDirectory(prefix="soma-faults-") as folder, ExitStack() as held:
        shared: dict[str, Any] = {}
        for fault in faults:
            scene = Scene(quick, Path(folder), held, shared)
            whole = Row(fault.name, "as a whole")
            with timed(whole):
                fault.play(scene)
            yield fault, [*scene.rows, *([whole] if whole.broken else [])]
