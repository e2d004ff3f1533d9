"""What belongs to what in two texts whose words answer to each other: the bound of a quantity, the clause that
a negation denies, the code that is quoted, the members of a list, the order of steps.

Guarantees: symmetric in its two texts; work grows with the square of `wording.MOST_ITEMS` at most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from soma_vllm.method.gap.alignment import Alignment, clauses
from soma_vllm.method.gap.lexicon import EXCLUSIVE, NEGATIVE, NEGATORS, RESTRICTING
from soma_vllm.method.gap.wording import Item, Text, plain

_UP = (
    r"minimum(?: of)?|min\.?|over|above|(?:more|greater|higher|later|longer|older|hotter) than|exceeds?|"
    r"beyond|after|from|since|starting(?: at| on)?|ab|über|mehr als|nach|seit|après|dès|depuis|plus de|desde|"
    r"después de|más de|dopo|oltre|più di|depois d[eao]|mais de|na|vanaf|meer dan"
)
_DOWN = (
    r"maximum(?: of)?|max\.?|under|below|(?:less|fewer|lower|earlier|shorter|younger|colder) than|up to|within|"
    r"before|until|till|by|no later than|bis(?: zu)?|unter|weniger als|vor|innerhalb von|jusqu['’]à|avant|"
    r"moins de|hasta|antes de|menos de|prima del(?:le)?|entro|meno di|antes d[ao]|até|voor|minder dan|tot"
)
_ARTICLE = r"(?:\s+(?:the|a|an|of|about|around|den|dem|der|la|le|las|los|les|o|a|il|de))?\s*[$€£]?\s*"
_BEFORE = re.compile(
    rf"(?:\b(?P<up>{_UP})|\b(?P<down>{_DOWN})|(?P<more>[>≥])|(?P<less>[<≤])){_ARTICLE}\Z", re.I
)
_AFTER = re.compile(
    r"\s*(?:[\w°%€$]+\s+)?(?:(?P<up>(?:or|and|oder|ou|o)\s+(?:more|above|over|older|later|mehr|plus|más)"
    r"|(?:at )?minimum|mindestens)|(?P<down>(?:or|and|oder|ou|o)\s+(?:less|fewer|below|under|younger|earlier"
    r"|weniger|moins|menos)|at (?:the )?(?:most|latest)|max\b))",
    re.I,
)
_DENIED = re.compile(
    r"\b(?:not|never|no|cannot|\w+n['’]t|nicht|nie|kein\w*|pas|jamais|no|nunca|non)\b[^.;:,]*\Z", re.I
)
_CLOCKED = frozenset(["by", "from", "ab", "na", "tot"])
"""Bounds of times and dates alone; beside other quantities these words say other things."""
_THEN = re.compile(
    r"\b(?:(?:and )?then|after (?:that|this|which)|afterwards|next,|finally|lastly|dann|danach|puis|"
    r"ensuite|luego|después|poi|depois|daarna)\b|\n\s*(?:\d{1,2}[.)]|[-*•])",
    re.I,
)
_TOKEN = re.compile(r"[\w'’-]+")
_LESS = frozenset(["unless", "except", "without", "ohne", "sans", "senza", "sin"])
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LISTED = re.compile(r"[,;\n&]|\b(?:and|or|und|oder|et|ou|y|o|e|en)\b", re.I)


def bounds(a: Text, b: Text, alignment: Alignment) -> tuple[bool, bool]:
    """Whether a quantity of both is a lower bound in one and an upper one in the other; and whether one alone
    bounds it."""
    found = [
        (_bound(a, a.items[i]), _bound(b, b.items[j]))
        for i, j in alignment.pairs
        if a.items[i].fact is not None
    ]
    return any(x * y < 0 for x, y in found), any((x == 0) != (y == 0) for x, y in found)


def _bound(text: Text, item: Item) -> int:
    """1 for a lower bound ("over 25"), -1 for an upper one ("by noon"), 0 for neither."""
    before = text.text[max(0, item.start - 48) : item.start]
    match = _BEFORE.search(before)
    if match is None:
        after = _AFTER.match(text.text[item.end : item.end + 40])
        return 0 if after is None else 1 if after["up"] else -1
    word = (match["up"] or match["down"] or "").lower()
    if word in _CLOCKED and item.fact is not None and item.fact.kind == "number":
        return 0
    sign = 1 if match["up"] or match["more"] else -1
    return -sign if _DENIED.search(before[: match.start()]) else sign


def denied_elsewhere(a: Text, b: Text, alignment: Alignment) -> bool:
    """Whether both deny something, and each what the other affirms."""
    if not (a.negators and b.negators) or "unless" in f"{a.text} {b.text}".lower():
        return False
    in_a, in_b = (_denied(text) for text in (a, b))
    found = {(in_a[i], in_b[j]) for i, j in alignment.pairs}
    return (True, False) in found and (False, True) in found and (True, True) not in found


def _denied(text: Text) -> list[bool]:
    """Of each item, whether its clause holds a negation."""
    where = set(clauses(text, text.negators))
    return [clause in where for clause in clauses(text, [item.start for item in text.items])]


def bare_negation(a: Text, b: Text) -> bool:
    """Whether one text has a negation more, and the other no word that could stand for it."""
    said_a, said_b = (list(map(plain, _TOKEN.findall(text.text))) for text in (a, b))
    count = _denials(said_a, a) - _denials(said_b, b)
    if count % 2 == 0:
        return False
    said, words = map(set, (said_a, said_b) if count > 0 else (said_b, said_a))
    only = words - said
    if said & {"until", "bis", "rather", "instead"}:
        return False
    return not (only & (NEGATIVE | NEGATORS)) and not any(
        len(word) > 5 and (word.startswith(("un", "dis", "non")) or word.endswith("less")) for word in only
    )


def _denials(words: Sequence[str], text: Text) -> int:
    """Negations but those that may be a condition or a manner ("unless", "without")."""
    return len(text.negators) - sum(word in _LESS for word in words)


def exclusive_alone(a: Text, b: Text) -> bool:
    """Whether one text says "only" and the other nothing like it."""
    in_a, in_b = (set(map(plain, _TOKEN.findall(text.text))) for text in (a, b))
    return any(
        these & EXCLUSIVE and not those & (EXCLUSIVE | RESTRICTING | NEGATORS)
        for these, those in ((in_a, in_b), (in_b, in_a))
    )


def quoted_otherwise(a: Text, b: Text) -> bool:
    """Whether each text quotes code that the other does not hold."""
    these, those = (["".join(code.split()) for code in _INLINE.findall(text.text)] for text in (a, b))
    in_a, in_b = ("".join(text.text.split()) for text in (a, b))
    return any(code not in in_b for code in these) and any(code not in in_a for code in those)


def other_members(a: Text, b: Text, alignment: Alignment) -> bool:
    """Whether lists of one length differ in one member, and the texts in hardly anything else."""
    sides = ((a, alignment.left), (b, alignment.right))
    if not (a.listed == b.listed > 1 and all(0 < len(left) <= 2 for _, left in sides)):
        return False
    return all(sum(item in _members(text) for item in left) == 1 for text, left in sides)


def _members(text: Text) -> list[Item]:
    """Items beside a separator of a list."""
    gaps = [
        _LISTED.search(text.text[one.end : other.start]) is not None
        for one, other in zip(text.items, text.items[1:], strict=False)
    ]
    beside = zip([False, *gaps], [*gaps, False], strict=True) if text.items else ()
    return [item for item, near in zip(text.items, beside, strict=True) if any(near)]


def steps_reversed(a: Text, b: Text, pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether both tell steps in an order ("then", numbered lines), and the orders differ."""
    in_a, in_b = (_stages(text) for text in (a, b))
    if not (max(in_a, default=0) and max(in_b, default=0)):
        return False
    turned = kept = 0
    for n, (i, j) in enumerate(pairs):
        for k, m in pairs[n + 1 :]:
            product = (in_a[i] - in_a[k]) * (in_b[j] - in_b[m])
            turned, kept = turned + (product < 0), kept + (product > 0)
    return turned > 0 and turned >= 0.3 * (turned + kept)


def _stages(text: Text) -> list[int]:
    marks = [match.start() for match in _THEN.finditer("\n" + text.text)]
    return [sum(mark <= item.start for mark in marks) for item in text.items]
