"""The shortest edit from one text to another, word by word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from soma_vllm.method.gap.wording import Item, Text, plain


@dataclass(frozen=True)
class Edit:
    """What turns one text into the other, word by word."""

    kept: float
    """Share of the words that stay, in [0, 1]."""
    replaced: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """Words in the same place, between words that stay."""
    moved: int
    """Words put in or left out elsewhere."""
    cut: str
    """Where the only difference is that one text lacks words of the other: head, middle or tail; else empty."""


_ANY = re.compile(r"\w+(?:['’]\w+)?")
_MOST_EDITED = 150


def edit(a: Text, b: Text, pairs: Sequence[tuple[int, int]]) -> Edit:
    """The shortest edit; words and quantities that answer to each other count as the same."""
    partner = {b.items[j].start: a.items[i] for i, j in pairs}
    these = _tokens(a, {})
    those = _tokens(b, partner)
    matcher = SequenceMatcher(None, these, those, autojunk=False)
    replaced, moved, kept = [], 0, 0
    steps = matcher.get_opcodes()
    for kind, i, k, j, m in steps:
        if kind == "equal":
            kept += k - i
        elif kind == "replace" and max(k - i, m - j) <= 4:
            replaced.append((tuple(these[i:k]), tuple(those[j:m])))
        else:
            moved += max(k - i, m - j)
    most = max(len(these), len(those))
    return Edit(kept / most if most else 1.0, tuple(replaced), moved, _cut([kind for kind, *_ in steps]))


def _cut(kinds: list[str]) -> str:
    if set(kinds) not in ({"equal", "insert"}, {"equal", "delete"}):
        return ""
    if len(kinds) > 2:
        return "middle"
    return "tail" if kinds[0] == "equal" else "head"


def _tokens(text: Text, partner: dict[int, Item]) -> list[str]:
    """Words of a text, those with a counterpart spelt as that is."""
    quantities = {item.start: item for item in text.items if item.fact is not None}
    found: list[str] = []
    end = 0
    for match in _ANY.finditer(text.text):
        if match.start() < end:
            continue
        item = quantities.get(match.start())
        other = partner.get(match.start())
        if item is not None:
            end = item.end
        spelt = other if other is not None else item
        if spelt is not None:
            found.append(spelt.word or (spelt.fact.text.lower() if spelt.fact else ""))
        else:
            found.append(plain(match.group()))
        if len(found) == _MOST_EDITED:
            break
    return found
