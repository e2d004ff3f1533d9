"""Which words of one text answer to words of another, and what keeps its place.

Guarantees: symmetric in its two texts; work grows with the product of the words that are left over, which
`wording.MOST_ITEMS` bounds.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from soma_vllm.method.gap.lexicon import SAYING, opposites, synonyms
from soma_vllm.method.gap.wording import Item, Text

_SUFFIXES = frozenset(
    [
        "",
        "s",
        "es",
        "ed",
        "d",
        "ing",
        "er",
        "ers",
        "ly",
        "ion",
        "ions",
        "tion",
        "tions",
        "ation",
        "y",
        "ies",
        "ied",
        "e",
        "en",
        "n",
        "em",
        "r",
        "rs",
        "or",
        "ors",
        "t",
        "te",
        "ten",
        "st",
        "al",
        "able",
        "ment",
        "ments",
        "ness",
        "ity",
        "ive",
        "ative",
        "nt",
        "nd",
        "ung",
        "ungen",
        "a",
        "o",
        "as",
        "os",
        "ada",
        "ado",
        "ar",
        "ir",
        "é",
        "ée",
        "és",
        "ées",
        "ent",
        "ait",
        "ant",
        "eur",
        "euse",
        "re",
        "ir",
        "ning",
        "ned",
        "ting",
        "ted",
        "ping",
        "ped",
        "ging",
        "ged",
        "ning",
        "ming",
        "med",
        "ler",
        "ling",
        "led",
        "'s",
    ]
)
_COORDINATED = re.compile(
    r"[\s,;*•|-]*(?:(?:and|or|but|und|oder|aber|et|ou|mais|y|o|e|pero|&)\s+)?(?:(?:an?|the|le|la|les|l'|der|die|das|el|un|una|une|ein)\s+)?",
    re.I,
)
_RELATION = re.compile(
    r"\b(?:not|than|to|from|into|over|before|after|instead|rather|by|nicht|als|nach|von|zu|vor|statt|pas|que|à|avant|après|no|a|"
    r"de|desde|hasta|antes|después)\b",
    re.I,
)
_CLAUSE = re.compile(
    r"[.;,:!?\n]|\b(?:and|but|then|und|aber|dann|et|mais|puis|y|pero|luego|because|weil|denn|porque|unless)\b",
    re.I,
)


@functools.lru_cache(maxsize=20_000)
def related(a: str, b: str) -> bool:
    """Whether two words are forms of one word, or may stand for each other."""
    if a == b or b in synonyms().get(a, ()) or a.replace("ß", "ss") == b.replace("ß", "ss"):
        return True
    if _inflected(a, b):
        return True
    stems = _stems(a)
    return any(other in synonyms().get(stem, ()) for stem in stems for other in _stems(b))


def opposed(a: str, b: str) -> bool:
    """Whether two words contradict each other."""
    if b in opposites().get(a, ()):
        return True
    if any(
        a == f"{prefix}{b}" or b == f"{prefix}{a}"
        for prefix in ("un", "in", "im", "ir", "il", "dis", "non", "a")
    ):
        return min(len(a), len(b)) > 3
    return any(other in opposites().get(stem, ()) for stem in _stems(a) for other in _stems(b))


def _inflected(a: str, b: str) -> bool:
    shared = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        shared += 1
    if shared < min(4, len(a), len(b)) or shared < 3:
        return False
    return a[shared:] in _SUFFIXES and b[shared:] in _SUFFIXES and shared >= 0.6 * min(len(a), len(b))


@functools.lru_cache(maxsize=20_000)
def _stems(word: str) -> tuple[str, ...]:
    found = [word]
    for suffix, into in (
        ("ies", "y"), ("ied", "y"), ("es", ""), ("s", ""), ("ed", ""), ("ed", "e"), ("ing", ""), ("ing", "e"),
        ("d", ""),
        ("ly", ""), ("er", ""), ("est", ""),
    ):  # fmt: skip
        if word.endswith(suffix) and len(word) - len(suffix) >= 3:
            stem = word[: len(word) - len(suffix)] + into
            found += [stem, stem[:-1]] if len(stem) > 3 and stem[-1:] == stem[-2:-1] else [stem]
    return tuple(found)


@dataclass(frozen=True)
class Alignment:
    """Which items of two texts answer to each other."""

    pairs: tuple[tuple[int, int], ...]
    """Positions among the items of each."""
    left: tuple[Item, ...]
    """Without counterpart in the other text."""
    right: tuple[Item, ...]


def align(a: Text, b: Text) -> Alignment:
    """Match equal items first, then related words, each with the nearest place."""
    free_a, free_b = dict(enumerate(a.items)), dict(enumerate(b.items))
    pairs: list[tuple[int, int]] = []
    places: dict[str, list[int]] = {}
    for j, item in free_b.items():
        places.setdefault(item.word, []).append(j)
    for test in (_equal, _related):
        for i, item in list(free_a.items()):
            likely = places.get(item.word, ()) if test is _equal else free_b
            fitting = [j for j in likely if j in free_b and test(item, b.items[j])]
            if fitting:
                j = min(fitting, key=lambda j: abs(i / len(a.items) - j / len(b.items)))
                pairs.append((i, j))
                del free_a[i], free_b[j]
    for free, pool, others in ((free_a, b.items, free_b), (free_b, a.items, free_a)):
        # Said twice in one text, once in the other: "June 5 ... on 5 June".
        contested = any(item.fact is not None for item in others.values())
        for i, item in list(free.items()):
            if not (item.fact and contested) and any(
                _equal(item, other) or _related(item, other) for other in pool
            ):
                del free[i]
    return Alignment(tuple(sorted(pairs)), tuple(free_a.values()), tuple(free_b.values()))


def _equal(a: Item, b: Item) -> bool:
    if a.fact is not None and b.fact is not None:
        return a.fact.same(b.fact)
    return a.word == b.word and a.fact is None and b.fact is None


def _related(a: Item, b: Item) -> bool:
    return a.fact is None and b.fact is None and related(a.word, b.word) and not opposed(a.word, b.word)


def transposed(a: Text, b: Text, pairs: Iterable[tuple[int, int]]) -> tuple[Item, Item] | None:
    """The two items that changed places between texts whose other common items keep theirs; None if others
    move.

    Neighbours do not count, but numbers ("3 to 1") that are no members of an enumeration.
    """
    order = [j for _, j in sorted(pairs)]
    ranks = {j: rank for rank, j in enumerate(sorted(order))}
    moved = [place for place, j in enumerate(order) if ranks[j] != place]
    if len(moved) != 2:
        return None
    places = [i for i, _ in sorted(pairs)]
    neighbours = places[moved[0]] + 1 == places[moved[1]]
    first, second = a.items[places[moved[0]]], a.items[places[moved[1]]]
    between = a.text[first.end : second.start]
    numbers = first.fact is not None and second.fact is not None
    if (first.fact is None) != (second.fact is None):
        return None
    related_by = _RELATION.search(between) or SAYING & set(between.lower().split())
    if neighbours and (_COORDINATED.fullmatch(between) or not (numbers or related_by)):
        return None
    return first, second


def exchanged(a: Text, b: Text, pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether two parts of a sentence changed places around a word such as "into", the rest as it was."""
    order = sorted(pairs)
    ranks = {j: rank for rank, j in enumerate(sorted(j for _, j in order))}
    found = [ranks[j] for _, j in order]
    while found and found[0] == len(order) - len(found):
        found.pop(0)
    start, cut = len(order) - len(found), found.index(min(found)) if found else 0
    while len(found) > 1 and found[-1] == start + len(found) - 1:
        found.pop()
    if cut == 0 or found != [
        *range(start + len(found) - cut, start + len(found)),
        *range(start, start + len(found) - cut),
    ]:
        return False
    in_a = a.text[a.items[order[start + cut - 1][0]].end : a.items[order[start + cut][0]].start]
    last = sorted(j for _, j in order)[start + len(found) - cut - 1]
    in_b = b.text[b.items[last].end : b.items[min(j for j in ranks if j > last)].start]
    said = [set(map(str.lower, _RELATION.findall(text))) for text in (in_a, in_b)]
    return bool(said[0] & said[1])


def clause_breaks(a: Text, b: Text, pairs: Sequence[tuple[int, int]]) -> float:
    """Share of neighbours within a clause of one text that are in different clauses of the other, in [0, 1]."""
    of_a, of_b = (clauses(text, [item.start for item in text.items]) for text in (a, b))
    if max(of_a, default=0) == 0 or max(of_b, default=0) == 0:
        return 0.0
    broken = total = 0
    for n, (i, j) in enumerate(pairs):
        for k, m in pairs[n + 1 : n + 4]:
            together = of_a[i] == of_a[k], of_b[j] == of_b[m]
            total += any(together)
            broken += together[0] != together[1]
    return broken / total if total else 0.0


def clauses(text: Text, places: Iterable[int]) -> list[int]:
    """The number of the clause that each place lies in; places in increasing order."""
    cuts = [match.start() for match in _CLAUSE.finditer(text.text)]
    return [bisect.bisect_left(cuts, place) for place in places]


def vectors(
    items: Sequence[Item], spans: Sequence[tuple[int, int]], tokens: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """(n, d) unit vector of each item in its context; zeros beyond what the encoder read."""
    if tokens is None or not len(items):
        return np.zeros((len(items), 0 if tokens is None else tokens.shape[1]), dtype=np.float32)
    found = np.zeros((len(items), tokens.shape[1]), dtype=np.float32)
    at = 0
    for row, item in zip(found, items, strict=True):
        while at < len(spans) and spans[at][1] <= item.start:
            at += 1
        end = at
        while end < len(spans) and spans[end][0] < item.end:
            end += 1
        if end > at:
            row[:] = tokens[at:end].mean(axis=0)
            row /= max(float(np.linalg.norm(row)), 1e-9)
    return found
