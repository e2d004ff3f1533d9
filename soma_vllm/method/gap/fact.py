"""A quantity of a text, and when two mean the same."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fact:
    """One quantity of a text."""

    kind: str
    """number, date, time, weekday or identifier."""
    text: str
    start: int
    end: int
    readings: tuple[tuple[object, ...], ...] = field(default=())
    """What it may mean. number: (value, dimension or None, value in the base unit); date: (year, month, day),
    each or
    None; time: (minute of the day,); weekday: (0-6,); identifier: (letters and digits,)."""
    weak: bool = False
    """A word that is often no quantity: "one", "first"."""

    def same(self, other: Fact) -> bool:
        """Whether both can mean the same."""
        kinds = {self.kind, other.kind}
        if len(kinds) == 1:
            test = _SAME[self.kind]
            return any(test(a, b) for a in self.readings for b in other.readings)
        if kinds == {"number", "time"}:
            number, time = (self, other) if self.kind == "number" else (other, self)
            return any(
                n[1] in (None, "time") and (_oclock(n[0], t[0]) or (n[1] == "time" and n[2] == 60.0 * t[0]))  # type: ignore[operator]
                for n in number.readings
                for t in time.readings
            )
        if kinds == {"number", "date"}:
            number, date = (self, other) if self.kind == "number" else (other, self)
            return any(n[0] in (d[0], d[2]) for n in number.readings for d in date.readings)
        if kinds == {"number", "identifier"}:
            number, name = (self, other) if self.kind == "number" else (other, self)
            return re.sub(r"\D", "", number.text) == re.sub(r"\D", "", name.text)
        return False


def _oclock(hours: object, minutes: object) -> bool:
    return isinstance(hours, float) and isinstance(minutes, int) and hours * 60 in (minutes, minutes - 720)


def _close(a: float, b: float, tolerance: float) -> bool:
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12)


def _same_number(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    value_a, dimension_a, base_a = a
    value_b, dimension_b, base_b = b
    assert isinstance(value_a, float)
    assert isinstance(value_b, float)
    assert isinstance(base_a, float)
    assert isinstance(base_b, float)
    if dimension_a == dimension_b:
        # A converted value is a rounded one.
        converted = not _close(value_a, value_b, 1e-9) and dimension_a is not None
        return _close(base_a, base_b, 4e-3 if converted else 1e-9)
    if dimension_a is None or dimension_b is None:
        return _close(value_a, value_b, 1e-9) or (
            "ratio" in (dimension_a, dimension_b) and _close(base_a, base_b, 1e-9)
        )
    return False


def _same_date(a: tuple[object, ...], b: tuple[object, ...]) -> bool:
    both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return bool(both) and all(x == y for x, y in both)


_SAME: dict[str, Callable[[tuple[object, ...], tuple[object, ...]], bool]] = {
    "number": _same_number,
    "date": _same_date,
    "time": lambda a, b: a == b,
    "weekday": lambda a, b: a == b,
    "identifier": lambda a, b: a == b,
}
