"""What speaks against two answers saying the same, as numbers: facts that differ, words that are left over,
and the
encoder's distances.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from soma_vllm.method.gap import bindings
from soma_vllm.method.gap.alignment import (
    Alignment,
    align,
    clause_breaks,
    exchanged,
    opposed,
    transposed,
    vectors,
)
from soma_vllm.method.gap.lexicon import EXCLUSIVE, LESSER, NEGATORS
from soma_vllm.method.gap.readings import Reading
from soma_vllm.method.gap.word_edit import Edit, edit
from soma_vllm.method.gap.wording import Item, Text
from soma_vllm.sessions.state.gate import gap

HARD = (
    "quantity",
    "opposite",
    "answer",
    "language",
    "order",
    "quantity_bound",
    "negation_close",
    "name",
    "list_member",
    "steps",
    "constraint_cut",
    "step_missing",
    "bound",
    "denied",
    "code",
    "members",
    "reversed",
    "exclusive_alone",
)
"""Contradictions of fact: one alone tells two answers apart."""


@dataclass
class Evidence:
    """The features of one pair, by name, and their reasons in words."""

    features: dict[str, float] = field(default_factory=dict)
    why: list[str] = field(default_factory=list)
    least: float = 0.0
    """The gap is no smaller: that two texts have nothing to do with each other is outweighed by no feature."""

    def add(self, name: str, value: float, why: str = "") -> None:
        """Record a feature; a reason where it is not 0."""
        self.features[name] = float(value)
        if value and why:
            self.why.append(why)


def collect(a: Text, b: Text, of_a: Reading, of_b: Reading) -> Evidence:
    """Everything that is known of a pair of texts in prose."""
    found = Evidence()
    alignment = align(a, b)
    change = edit(a, b, alignment.pairs)
    _quantities(a, b, alignment, found)
    _polarity(a, b, alignment, change, found)
    _order(a, b, alignment, change, found)
    _slots(a, b, alignment, change, found)
    _words(a, b, alignment, (of_a, of_b), found)
    _bindings(a, b, alignment, found)
    _manners(a, b, found)
    found.add("hard", any(found.features[name] for name in HARD))
    distance = min(1.0, gap(of_a.vector, of_b.vector))
    found.add("encoder", distance)
    found.least = _unrelated(alignment, min(len(a.items), len(b.items)), distance)
    if found.least:
        found.why.append("they share no words")
    return found


def _unrelated(alignment: Alignment, items: int, distance: float) -> float:
    """The least gap of two texts, by how few content words answer to each other: right paraphrases of the
    tuning half share at least a third of the shorter text's, or are near for the encoder."""
    shared = len(alignment.pairs)
    if (not shared and distance > 0.5) or (items and shared / items <= 0.34 and distance > 0.75):
        return distance
    return 0.5 if not shared and 0 < items <= 2 and distance > 0.2 else 0.0


def _said(items: Sequence[Item]) -> str:
    return ", ".join(item.word or (item.fact.text if item.fact else "") for item in items[:4]) or "nothing"


def _quantities(a: Text, b: Text, alignment: Alignment, found: Evidence) -> None:
    left = [item for item in alignment.left if item.fact is not None]
    right = [item for item in alignment.right if item.fact is not None]
    strong = [[item for item in side if item.fact is not None and not item.fact.weak] for side in (left, right)]
    conflict = bool(left and right and (strong[0] or strong[1] or _kinds(left) & _kinds(right)))
    found.add("quantity", conflict, f"{_said(left)} / {_said(right)}")
    within = (not alignment.left or not alignment.right) and min(len(a.items), len(b.items)) <= 2
    missing = 0 if conflict or within else max(len(side) for side in strong)
    found.add("quantity_missing", min(missing, 2), f"in one alone: {_said([*left, *right])}")
    bound = _bound_otherwise(a, b, alignment) and (not alignment.left or not alignment.right)
    found.add("quantity_bound", bound, "numbers belong to other words")


def _kinds(items: Sequence[Item]) -> set[str]:
    return {item.fact.kind for item in items if item.fact is not None}


def _bound_otherwise(a: Text, b: Text, alignment: Alignment) -> bool:
    """Whether a word stands beside one number in one text and beside another number in the other."""
    matched = {(i, j) for i, j in alignment.pairs}
    partner = dict(matched)
    swapped = 0
    for i, j in alignment.pairs:
        if a.items[i].fact is None:
            continue
        for step in (1, -1):
            k, m = i + step, j + step
            if not (0 <= k < len(a.items) and 0 <= m < len(b.items)):
                continue
            word = a.items[k]
            if word.fact is None and k in partner and partner[k] != m:
                other = partner[k] - step
                moved = 0 <= other < len(b.items) and b.items[other].fact is not None and other != j
                swapped += moved and not a.items[i].fact.same(b.items[other].fact)  # type: ignore[union-attr,arg-type]
    return swapped >= 2


def _opposites(a: Text, b: Text, alignment: Alignment, change: Edit) -> set[tuple[str, str]]:
    """Words of the two texts that contradict each other, content words anywhere, others in the same place."""
    found = {(x.word, y.word) for x in alignment.left for y in alignment.right if x.word and y.word}
    found |= {(x, y) for these, those in change.replaced for x in these for y in those}
    both = {item.word for item in a.items} & {item.word for item in b.items}
    return {(x, y) for x, y in found if opposed(x, y) and not {x, y} & NEGATORS and not {x, y} <= both}


def _polarity(a: Text, b: Text, alignment: Alignment, change: Edit, found: Evidence) -> None:
    opposites = _opposites(a, b, alignment, change)
    negated = abs(a.negations - b.negations) % 2 == 1
    swap = transposed(a, b, alignment.pairs) is not None and a.passive == b.passive
    words_a, words_b = ({item.word for item in text.items} for text in (a, b))
    lesser = bool(words_a & LESSER) != bool(words_b & LESSER)
    opposite = any(x not in LESSER for x, _ in opposites) + lesser
    said = "; ".join(f"{x} / {y}" for x, y in sorted(opposites)[:3])
    odd = (opposite + negated + swap) % 2 == 1
    found.add("opposite", bool(opposite) and odd, f"opposites: {said}")
    found.add("opposite_even", bool(opposite) and not odd)
    close = change.kept >= 0.6 or not alignment.left or not alignment.right
    found.add("negation", negated and not opposite and not close, "negated in one alone")
    found.add("negation_close", negated and not opposite and close, "negated in one alone")
    known = a.answer is not None and b.answer is not None
    found.add("answer", known and a.answer != b.answer, "yes in one, no in the other")
    found.add("answer_alone", (a.answer is None) != (b.answer is None))


_THEN = re.compile(r"\b(?:then|dann|danach|puis|ensuite|luego|después)\b", re.I)
_CONDITION = re.compile(
    r"\W*(?:if|unless|except|after|before|from|with|without|within|for|on|in|at|by|until|only|and|but|when|while|during|to|over|under|"
    r"wenn|außer|nach|vor|mit|ohne|und|für|bis|ab|si|sauf|après|avant|avec|sans|et|pour|con|sin|antes|y|para|hasta|salvo)\b",
    re.I,
)


def _constrains(a: Text, b: Text) -> bool:
    """Whether the longer text goes on, in the same sentence, with a condition or a further part."""
    shorter, longer = sorted((a.text.strip(), b.text.strip()), key=len)
    begun = longer[len(shorter.rstrip(".!; ")) :]
    return (
        len(shorter.split()) >= 3
        and not begun.lstrip().startswith((".", "!", "?"))
        and _CONDITION.match(begun) is not None
    )


def _slots(a: Text, b: Text, alignment: Alignment, change: Edit, found: Evidence) -> None:
    """Words left over in the same place of two texts that are otherwise alike."""
    left = {item.word for item in alignment.left if item.fact is None}
    right = {item.word for item in alignment.right if item.fact is None}
    filled = [(x, y) for x, y in change.replaced if left & set(x) and right & set(y)]
    function = [(x, y) for x, y in change.replaced if not left & set(x) and not right & set(y)]
    if found.features["opposite_even"] and len(change.replaced) == 1:
        filled = [(x, y) for x, y in filled if not any(opposed(one, other) for one in x for other in y)]
    alike = change.kept >= 0.5 and change.moved <= 1
    said = "; ".join(f"{' '.join(x)} / {' '.join(y)}" for x, y in filled[:3])
    found.add("slot", bool(filled) and alike, said)
    found.add("slot_only", bool(filled) and not change.moved and not function, said)
    single = [(x, y) for x, y in filled if len(x) == len(y) == 1]
    found.add("slot_single", bool(single) and alike, said)
    found.add("kept", change.kept * bool(filled))
    whole = not alignment.left or not alignment.right
    found.add(
        "constraint_cut", whole and change.cut == "tail" and _constrains(a, b), "a condition is in one alone"
    )
    more, fewer = (a, b) if len(a.items) > len(b.items) else (b, a)
    lost = len(_THEN.findall(more.text)) > len(_THEN.findall(fewer.text)) and len(more.items) > len(fewer.items)
    found.add("step_missing", whole and lost and not change.replaced, "a step is in one alone")
    leftover = [item.word for item in (*alignment.left, *alignment.right)]
    for place in ("head", "middle", "tail"):
        cut = change.cut == place and bool(leftover) and len(alignment.pairs) >= 3
        found.add(f"cut_{place}", cut, f"in one alone: {_said([*alignment.left, *alignment.right])}")
    found.add("same_words", change.kept >= 0.999 and not filled)


def _order(a: Text, b: Text, alignment: Alignment, change: Edit, found: Evidence) -> None:
    whole = not alignment.left or not alignment.right
    pair = transposed(a, b, alignment.pairs)
    known = a.languages | b.languages
    free = bool(known) and known <= {"de", "nl"} and len(alignment.pairs) <= 6
    moved = pair is not None and a.passive == b.passive and not free and not found.features["opposite_even"]
    blocks = a.passive == b.passive and change.kept >= 0.4 and exchanged(a, b, alignment.pairs)
    said = _said(list(pair)) if pair else "parts of the sentence"
    found.add("order", (moved or blocks) and whole, f"changed places: {said}")
    breaks = clause_breaks(a, b, alignment.pairs)
    found.add("clauses", breaks if whole and len(alignment.pairs) > 3 else 0.0)
    found.add("clauses_close", breaks * change.kept if whole and len(alignment.pairs) > 3 else 0.0)
    places = [j for _, j in alignment.pairs]
    turned = sum(x > y for n, x in enumerate(places) for y in places[n + 1 :])
    most = len(places) * (len(places) - 1) / 2
    same = len(alignment.left) + len(alignment.right) <= 1 and a.passive == b.passive
    found.add("inverted", turned / most if most and same and len(places) > 2 else 0.0)
    found.add(
        "steps",
        same and most and turned / most > 0.3 and min(_steps(a), _steps(b)) >= 3,
        "another order of steps",
    )
    lists = min(a.listed, b.listed) > 1 and a.listed != b.listed
    short = not alignment.left or not alignment.right
    found.add(
        "list_member", lists and short and found.features.get("steps", 0) == 0, "members of a list are missing"
    )
    found.add("list_length", lists, f"lists of {a.listed} / {b.listed}")


def _steps(text: Text) -> int:
    """Clauses of two words and more."""
    return sum(len(part.split()) >= 2 for part in re.split(r"[,;.\n]|\band then\b|\bthen\b", text.text))


def _words(a: Text, b: Text, alignment: Alignment, readings: tuple[Reading, Reading], found: Evidence) -> None:
    left = [item for item in alignment.left if item.fact is None]
    right = [item for item in alignment.right if item.fact is None]
    fewer, more = sorted((left, right), key=len)
    total = len(alignment.pairs) + len(fewer)
    in_a = vectors(a.items, readings[0].spans, readings[0].tokens)
    in_b = vectors(b.items, readings[1].spans, readings[1].tokens)
    likeness = _likeness(a, b, in_a, in_b)
    apart = [1.0 - likeness(item, left is fewer) for item in fewer]
    found.add("left_over", len(fewer) / total if total else 0.0)
    found.add("replaced", max(apart, default=0.0))
    found.add("replaced_mean", float(np.mean(apart)) if apart else 0.0)
    lone = len(a.items) == 1 or len(b.items) == 1
    found.add("lone", lone and bool(left and right), f"{_said(left)} / {_said(right)}")
    names = [[item for item in side if item.name] for side in (left, right)]
    found.add("name", bool(names[0] and names[1]), f"{_said(names[0])} / {_said(names[1])}")
    found.add("name_replaced", bool(names[0]) != bool(names[1]) and bool(left and right))
    found.add("name_missing", min(2, abs(len(names[0]) - len(names[1]))) if not (left and right) else 0)
    found.add("extra", (len(more) - len(fewer)) / (total + len(more)) if more else 0.0)
    found.add("extra_one", not fewer and 1 <= len(more) <= 2 and len(alignment.pairs) >= 3)
    found.add("contained", not fewer)
    found.add("contained_short", not fewer and min(len(a.items), len(b.items)) <= 2)
    recall, precision = _greedy(in_a, in_b), _greedy(in_b, in_a)
    found.add("bert_less", 1.0 - max(recall, precision))
    found.add("bert_more", 1.0 - min(recall, precision))


def _likeness(
    a: Text, b: Text, in_a: NDArray[np.float32], in_b: NDArray[np.float32]
) -> Callable[[Item, bool], float]:
    """The greatest cosine of an item to any of the other text."""

    def find(item: Item, of_a: bool) -> float:
        text, own, others = (a, in_a, in_b) if of_a else (b, in_b, in_a)
        if not own.size or not others.size:
            return 0.0
        return max(0.0, float((others @ own[text.items.index(item)]).max()))

    return find


def _greedy(these: NDArray[np.float32], those: NDArray[np.float32]) -> float:
    """Mean of each item's greatest cosine to those of the other text (BERTScore, arXiv 1904.09675)."""
    if not these.size or not those.size:
        return 1.0 if these.size == those.size else 0.0
    return float((these @ those.T).max(axis=1).mean())


def _bindings(a: Text, b: Text, alignment: Alignment, found: Evidence) -> None:
    """Bounds, negations, quoted code, members and steps that belong to something else."""
    opposed_bound, lone_bound = bindings.bounds(a, b, alignment)
    found.add("bound", opposed_bound, "a lower bound in one, an upper one in the other")
    found.add("bound_alone", lone_bound)
    found.add("denied", bindings.denied_elsewhere(a, b, alignment), "negated elsewhere")
    bare = (
        bindings.bare_negation(a, b) and not found.features["opposite"] and not found.features["opposite_even"]
    )
    found.add("negation_bare", bare, "negated in one alone")
    found.add("exclusive_alone", bindings.exclusive_alone(a, b), "only in one alone")
    found.add("code", bindings.quoted_otherwise(a, b), "other code is quoted")
    found.add("members", bindings.other_members(a, b, alignment), "lists have other members")
    found.add("reversed", bindings.steps_reversed(a, b, alignment.pairs), "another order of steps")


def _manners(a: Text, b: Text, found: Evidence) -> None:
    """Constraints, tags, signs and the language."""
    lost = a.constraints ^ b.constraints
    found.add("constraint", min(len(lost), 2), f"in one alone: {', '.join(sorted(lost))}")
    tags = a.tags ^ b.tags
    exclusive = (a.constraints ^ b.constraints) & EXCLUSIVE
    found.add("exclusive", bool(exclusive), f"in one alone: {', '.join(sorted(exclusive))}")
    found.add("tag", bool(tags), f"in one alone: {', '.join(sorted(tags))}")
    signs = [sign for sign in ("&", "!", "e-mail") if (sign in a.text) != (sign in b.text)]
    found.add("signs", len(signs), f"in one alone: {' '.join(signs)}")
    apart = bool(a.languages and b.languages) and not a.languages & b.languages
    found.add("language", apart, f"{'/'.join(sorted(a.languages))} and {'/'.join(sorted(b.languages))}")
