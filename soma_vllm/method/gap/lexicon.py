"""Word lists of the gap, read from `words.toml`, and from `wordnet.txt`: synonyms and antonyms of WordNet 3.1
among
common English words, whose notice stands in that file.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


_WORDS: Mapping[str, Any] = tomllib.loads(_text("words.toml"))


def _valued(text: str) -> dict[str, float]:
    return {word: float(value) for word, value in (item.split("=") for item in text.split())}


def _whole(text: str) -> dict[str, int]:
    return {word: int(value) for word, value in _valued(text).items()}


def _set(name: str) -> frozenset[str]:
    return frozenset(_WORDS[name].split())


def _german(small: dict[str, int]) -> dict[str, int]:
    """German writes hundreds and what follows them as one word."""
    ones = ["ein", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"]
    hundreds = {f"{one}hundert": 100 * n for n, one in enumerate(ones, 1)} | {"hundert": 100}
    joined = {f"{h}{rest}": v + n for h, v in hundreds.items() for rest, n in small.items() if 0 < n < 100}
    return small | joined | hundreds


NUMBER_WORDS: Mapping[str, Mapping[str, int]] = {
    name: _german(_whole(text)) if name == "de" else _whole(text) for name, text in _WORDS["numbers"].items()
}
"""The value of a number word, by language."""
SCALES = _valued(_WORDS["scales"])
ORDINALS = _whole(_WORDS["ordinals"])
FRACTIONS = _valued(_WORDS["fractions"])
TIMES_WORDS = _whole(_WORDS["times"])
MONTHS = _whole(_WORDS["months"])
WEEKDAYS = _whole(_WORDS["weekdays"])
AMBIGUOUS_MONTHS = _set("ambiguous_months")
"""Month names that are other words too: months beside a number, or where capitalised mid-sentence."""
UNITS = {
    name: (dimension, float(factor))
    for dimension, text in _WORDS["units"].items()
    for names, factor in (item.split("=") for item in text.split())
    for name in names.split(",")
}
"""(dimension, factor to its base unit) of a unit's names, in lower case. Temperatures are in `numerals`."""
AMBIGUOUS_NUMBERS = _set("ambiguous_numbers")
"""Number words that are other words in another language."""
NEGATORS = _set("negators")
YES = _set("yes")
NO = _set("no")
CONSTRAINTS = _set("constraints")
EXCLUSIVE = _set("exclusive")
RESTRICTING = _set("restricting")
"""Words that may say what another text says with "only"."""
NEGATIVE = _set("negative")
"""Words that may say what another text says with a negation."""
SAYING = _set("saying")
"""Words that introduce an answer and carry no fact of it."""
LESSER = _set("lesser")
"""Words that turn a comparison around."""
STOPWORDS: Mapping[str, frozenset[str]] = {
    name: frozenset(text.split()) for name, text in _WORDS["stopwords"].items()
}
"""Function words, by language."""


@functools.cache
def stopwords() -> frozenset[str]:
    """The function words of every language, and those of `SAYING`."""
    return frozenset().union(*STOPWORDS.values()) | SAYING


def _linked(groups: Iterable[Iterable[str]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for group in groups:
        words = list(group)
        for word in words:
            found.setdefault(word, set()).update(other for other in words if other != word)
    return found


def _groups(name: str) -> list[list[str]]:
    return [group.split() for group in _WORDS[name].replace("\n", " ").split("/")]


@functools.cache
def _wordnet(section: str) -> tuple[tuple[str, ...], ...]:
    lines = _text("wordnet.txt").partition(f"[{section}]\n")[2].partition("\n[")[0].splitlines()
    return tuple(tuple(line.split()) for line in lines)


@functools.cache
def synonyms() -> Mapping[str, set[str]]:
    """Words that may stand for a word, by its lower-case form."""
    found = _linked(_groups("synonyms"))
    for word, *others in _wordnet("synonyms"):
        for other in others:
            found.setdefault(word, set()).add(other)
            found.setdefault(other, set()).add(word)
    return found


@functools.cache
def opposites() -> Mapping[str, set[str]]:
    """Words that contradict a word, by its lower-case form."""
    return _linked([*_groups("opposites"), *_wordnet("antonyms")])
