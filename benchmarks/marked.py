"""What a document shows of a measurement: text between two marks, which a program makes and nobody edits."""

from __future__ import annotations

from pathlib import Path


def replace_marked(path: Path, name: str, made: str) -> None:
    """Put text between a document's marks of this name.

    Raises:
        ValueError: it has no such marks.
    """
    first, last = (f"<!-- {name}: {edge} -->" for edge in ("begin", "end"))
    head, begin, rest = path.read_text(encoding="utf-8").partition(first)
    _, end, tail = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{path}: found no {first} … {last}; expected both, around what is to be replaced")
    path.write_text(f"{head}{first}\n\n{made}\n{last}{tail}", encoding="utf-8")
