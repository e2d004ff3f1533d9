"""What two texts say in words: which words of one answer to words of the other, what is left over, and in what
order.

Guarantees: symmetric in its two texts; work grows with the product of the words that are left over, which
`MOST_ITEMS`
bounds; no text raises.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from soma_vllm.method.gap.fact import Fact
from soma_vllm.method.gap.lexicon import CONSTRAINTS, NEGATORS, NO, YES, stopwords
from soma_vllm.method.gap.quantities import facts, languages

MOST_ITEMS = 400


"""Words and quantities of a text that are compared, from its beginning."""
MOST_CHARACTERS = 8_000


"""Of a text, from its beginning."""
_WORD = re.compile(r"(?<!\w)(?:--?|\+)[A-Za-z][\w-]*|[^\W_]+(?:[-'’._/][^\W_]+)*[+#]{0,2}|[&@#]")
_TAG = re.compile(r"\[[A-Z][A-Z _-]*\]|(?<!\w)#\w+|\A[A-Z]{2,}(?: [A-Z]{2,})+\b|\A[A-Z]{3,}:")
_PASSIVE = re.compile(
    r"\b(?:was|were|is|are|been|be|being|wurden?|werden|wird|worden|est|sont|été|fue|fueron|es|son|sido)\b[^.;]{0,60}?\b(?:by|von|par|por)\b"
    r"|\b(?:was|were|is|are|been|be)\s+(?:\w+ly\s+)?\w+(?:ed|en|ght|ilt|ade)\b|\b\w+(?:ed|en"
    r"|ught) by\b|\b(?:lost|lose|loses)\b[^.;]{0,60}\bto\b",
    re.I,
)
_AND = re.compile(r"\s(?:and|or|und|oder|et|ou|y|o|e)\s")
_MEMBERS = re.compile(r",\s*(?:and|or|und|et|y)?\s*|\s(?:and|or|und|oder|et|ou|y|o|e)\s")
_LABEL = re.compile(r"(?<!\w)\(?([A-Ea-e])\)|^\W*([A-E])\W*$|\b(?:is|option|answer:?|choose)\s+\(?([A-E])\b\)?")
_FIRST_ALONE = re.compile(r"\W*\w+\s*(?:[,.;:!]|$)")
_PHRASES = tuple(
    (re.compile(rf"\b(?:{pattern})\b", re.I), into)
    for pattern, into in (
        (r"(?:has|have|with|contains?|are|is) no (?:elements?|items?|jobs?|entries)", "is empty"),
        (r"(?:went|goes|gone|go) up", "rose"), (r"(?:went|goes|gone|go) down", "fell"),
        (r"out of stock", "unavailable"),
        (r"at least|no (?:fewer|less) than|a minimum of|mindestens|au moins|al menos", "minimum"),
        (r"at most|no more than|a maximum of|höchstens|au plus|como máximo", "maximum"),
        (r"other than|apart from", "except"), (r"because of|due to|owing to|thanks to", "because"),
        (r"(?:takes?|took|taken) place", "is"), (r"on top of", "over"), (r"no longer|not any ?more", "not"),
        (r"switch(?:ed|es)? on|turn(?:ed|s)? on", "enable"),
        (r"switch(?:ed|es)? off|turn(?:ed|s)? off", "disable"),
        (r"in front of", "before"), (r"as well as", "and"), (r"is able to|are able to", "can"),
        (r"in spite of", "despite"), (r"rather than", "not"), (r"CO2", "carbon dioxide"),
    )
)  # fmt: skip


@dataclass(frozen=True)
class Item:
    """A content word or a quantity, in its place."""

    word: str
    """Lower case; empty for a quantity."""
    start: int
    end: int
    name: bool = False
    """A capital where no sentence begins, or a sign that is no word."""
    fact: Fact | None = None


@dataclass(frozen=True)
class Text:
    """A text as far as words and quantities go."""

    text: str
    items: tuple[Item, ...]
    negators: tuple[int, ...]
    """Where its negations stand."""
    answer: bool | None
    """True for a text that begins with yes, False with no."""
    constraints: frozenset[str]
    tags: frozenset[str]
    listed: int
    """Members of its enumeration; 0 where it has none."""
    languages: frozenset[str]
    passive: bool

    @property
    def negations(self) -> int:
        """How many there are."""
        return len(self.negators)


def simplified(text: str) -> str:
    """The beginning of a text, with one wording for phrases that have several."""
    text = text[:MOST_CHARACTERS]
    for pattern, into in _PHRASES:
        text = pattern.sub(into, text)
    return text


def read(text: str) -> Text:
    """The words and quantities of a simplified text."""
    spoken = languages(text)
    quantities, rest = facts(text, spoken)
    for match in _LABEL.finditer(rest):
        label = (match[1] or match[2] or match[3]).lower()
        quantities.append(Fact("identifier", label, match.start(), match.end(), ((label,),)))
    taken = [(fact.start, fact.end) for fact in quantities]
    items = [Item("", fact.start, fact.end, fact=fact) for fact in quantities]
    words = [match for match in _WORD.finditer(rest) if not any(s <= match.start() < e for s, e in taken[-8:])]
    worded = [(plain(match.group()), match) for match in words]
    begins = True
    for word, match in worded:
        between = rest[: match.start()].rstrip()
        begins = not between or between[-1] in ".!?:\n|\"'-([" or "\n" in rest[len(between) : match.start()]
        capital = match.group()[0].isupper()
        shouted = match.group().isupper() and (len(match.group()) > 1 or not (begins or word in "ai"))
        if word not in stopwords() or shouted:
            code = not match.group()[0].isalpha() or re.search(r"[._/]\w|[a-z][A-Z]", match.group()) is not None
            name = (capital and not begins) or shouted or code
            items.append(Item(word, match.start(), match.end(), name))
    known = [word for word, _ in worded]
    return Text(
        text,
        tuple(sorted(items, key=lambda item: item.start))[:MOST_ITEMS],
        tuple(worded[n][1].start() for n in _negations(known, _FIRST_ALONE.match(text) is not None)),
        _answer(known, text),
        frozenset(known) & CONSTRAINTS,
        frozenset(match.group().strip() for match in _TAG.finditer(text)),
        _listed(text),
        spoken,
        _PASSIVE.search(text) is not None,
    )


def plain(word: str) -> str:
    word = word.lower().replace("’", "'").removesuffix("'s")
    elided = re.match(r"(?:l|d|j|n|s|c|qu|m|t)'(\w.*)", word)
    if elided and word.startswith("n'"):
        return elided[1]
    word = elided[1] if elided else word
    return word if word.startswith(("-", "+")) else word.replace("-", "").rstrip(".")


def _negations(words: Sequence[str], alone: bool) -> list[int]:
    """Which words negate; a first word that stands alone is an answer and none of them."""
    answers = ("no", "nein", "non") if alone else ()
    return [
        place
        for place, word in enumerate(words)
        if (word.replace("'", "") in NEGATORS or word.endswith("n't")) and not (place == 0 and word in answers)
    ]


def _answer(words: Sequence[str], text: str) -> bool | None:
    for word in words[:1] if _FIRST_ALONE.match(text) else ():
        if word in YES:
            return True
        if word in NO:
            return False
    rest = [word for word in words if word not in stopwords()]
    if len(rest) == 1 and rest[0] in ("true", "false"):
        return rest[0] == "true"
    return None


def _listed(text: str) -> int:
    """Members of a bulleted or numbered list, or of the longest enumeration."""
    bullets = len(re.findall(r"(?m)^\s*(?:[-*•]|\d{1,2}[.)])\s+\S", text))
    if bullets > 1:
        return bullets
    best = 0
    for sentence in re.split(r"[.;:!?\n]\s", text):
        joints = [match.end() for match in _AND.finditer(sentence)]
        if not joints:
            continue
        comma = sentence.find(",", joints[-1])
        parts = _MEMBERS.split(sentence[: comma if comma >= 0 else len(sentence)])
        inner = [part for part in parts[1:] if part.strip()]
        if all(len(part.split()) <= 3 for part in inner[:-1]):
            best = max(best, len(inner) + 1)
    return best
