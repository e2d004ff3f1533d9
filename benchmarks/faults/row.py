"""The figures of one fault, and which of them must be zero.

Guarantees: a figure that must be zero is only raised together with words that say why; a fault that could not
be played has a reason, and one that broke off has failed.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

MOST_GROWTH_MIB = 64.0
"""Resident memory that a server may have gained after its first third of a soak, MiB."""
MOST_FOUND = 20
"""Findings of one fault that are kept in words."""


@dataclass
class Row:
    """What one fault did, at one step of a session's life."""

    fault: str
    step: str
    requests: int = 0
    wrong_adapter: int = 0
    """Replies under an adapter that did not say what that session was taught, or said what another was."""
    lost_turns: int = 0
    """Answered turns that are not on record once the server is back."""
    needless_5xx: int = 0
    """500, and any other 5xx that the same request, sent again at once, did not meet."""
    engine_deaths: int = 0
    """Ends of an engine or a server that the fault was not meant to end."""
    leaks: int = 0
    """Leases, holds, places at the original and reservations left when nothing is under way."""
    memory_mib: float | None = None
    """Growth of resident memory; None where it was not measured."""
    seconds: float = 0.0
    noted: Counter[str] = field(default_factory=Counter)
    """What a fault may cost: answers cut off, announced 503s, turns that were queued at a kill."""
    found: list[str] = field(default_factory=list)
    """What was wrong, in words."""
    skipped: str = ""
    """Why it could not be played here."""
    broken: str = ""
    """What ended it before its end."""

    @property
    def name(self) -> str:
        return f"{self.fault}: {self.step}"

    @property
    def fine(self) -> bool:
        """Whether every figure that must be zero is, and memory within its bound."""
        grown = self.memory_mib is not None and self.memory_mib > MOST_GROWTH_MIB
        return not (self.broken or grown or any(getattr(self, figure) for figure in MUST_BE_ZERO))

    def count(self, figure: str, why: str, times: int = 1) -> None:
        """Raise a figure that must be zero."""
        setattr(self, figure, getattr(self, figure) + times)
        if len(self.found) < MOST_FOUND:
            self.found.append(f"{figure} {times}: {why}")

    def document(self) -> dict[str, Any]:
        """The row for JSON."""
        found = {**vars(self), "noted": dict(self.noted), "seconds": round(self.seconds, 1)}
        if self.memory_mib is not None:
            found["memory_mib"] = round(self.memory_mib, 1)
        return found

    @classmethod
    def of(cls, document: dict[str, Any]) -> Row:
        return cls(**{**document, "noted": Counter(document["noted"])})


MUST_BE_ZERO = ("wrong_adapter", "lost_turns", "needless_5xx", "engine_deaths", "leaks")


@contextmanager
def timed(*rows: Row) -> Iterator[None]:
    """Rows that are played together: their seconds, and what broke them off."""
    began = time.monotonic()
    try:
        yield
    except Exception as error:  # whatever a fault uncovers: the other faults are to be played
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        for row in rows:
            row.broken = f"{type(error).__name__}: {error}"[:300]
    finally:
        for row in rows:
            row.seconds += time.monotonic() - began


def resident_mib(pid: int | None = None) -> float:
    """Resident memory of a process, MiB; by default of this one."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def until(what: str, true: Any, limit_s: float = 120.0) -> None:
    """Return once a condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.05)


def on_disk(folder: Path, name: str) -> Path:
    """The folder of a published adapter."""
    (manifest,) = (path for path in folder.rglob("soma.json") if f'"{name}"' in path.read_text())
    return manifest.parent
