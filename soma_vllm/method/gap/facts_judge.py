"""The gap that sees facts: data and code by their normal forms, sentences by the evidence that they differ.

Guarantees: symmetric, deterministic, in [0, 1]; 0 for texts with the same normal form. The gate's
`accept_threshold` keeps its scale: the calibration puts the pairs that should just pass at 0.12. Texts that
have nothing to do with each other are never near. Of a long text the beginning is compared
(`wording.MOST_CHARACTERS`; as data or code `MOST_STRUCTURED`), unless only the rest differs.

`weights.json` holds the logistic regression, which `python benchmarks/gap_weights.py fit` makes from the tuning
half of `tests/data/gap_pairs.jsonl`, with all-MiniLM-L6-v2 as the encoder.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Protocol

from soma_vllm.method.gap.evidence_of_pair import Evidence, collect
from soma_vllm.method.gap.readings import Reading
from soma_vllm.method.gap.structure import Difference, compare
from soma_vllm.method.gap.wording import MOST_CHARACTERS, read, simplified
from soma_vllm.types import Gap

MOST_STRUCTURED = 200_000
"""Characters that are parsed as data or code."""


class TokenVectors(Protocol):
    """What the judge asks of a sentence encoder (`method/encoder.py`)."""

    def read(self, texts: Sequence[str]) -> list[Reading]:
        """The vector of each text, and those of its tokens."""
        ...


class FactsJudge:
    """Compares answers by their facts, beside a sentence encoder."""

    def __init__(self, encoder: TokenVectors) -> None:
        self._encoder = encoder

    def gaps(self, pairs: Sequence[tuple[str, str]]) -> list[Gap]:
        """The gap of each pair, in order."""
        found = [_alike(*pair) for pair in pairs]
        open_pairs = [n for n, gap in enumerate(found) if gap is None]
        evidence = self.evidence([pairs[n] for n in open_pairs])
        judged = dict(zip(open_pairs, map(_weighed, evidence), strict=True))
        return [judged[n] if gap is None else gap for n, gap in enumerate(found)]

    def evidence(self, pairs: Sequence[tuple[str, str]]) -> list[Evidence]:
        """What speaks against each pair of sentences."""
        texts = list(dict.fromkeys(simplified(text) for pair in pairs for text in sorted(pair)))
        readings = dict(zip(texts, self._encoder.read(texts), strict=True))
        known = {text: read(text) for text in texts}
        found = []
        for pair in pairs:
            a, b = sorted(map(simplified, pair))  # one order, so that ties break alike
            found.append(collect(known[a], known[b], readings[a], readings[b]))
        return found


def _alike(a: str, b: str) -> Gap | None:
    try:
        return alike(a, b)
    except RecursionError:
        return Gap(1.0, ("one is nested too deep to be read",))


def alike(a: str, b: str) -> Gap | None:
    """The gap of a pair that needs no weighing: equal texts, an empty one, data or code. None for others."""
    if a.split() == b.split():
        return Gap(0.0)
    if not (a.strip() and b.strip()):
        return Gap(1.0, ("one is empty",))
    difference = _structure(a, b)
    if difference is None:
        if len(a) > MOST_CHARACTERS and a[:MOST_CHARACTERS] == b[:MOST_CHARACTERS]:
            return Gap(1.0, (f"they differ beyond {MOST_CHARACTERS} characters",))
        return None
    return Gap(0.0) if difference.equal else Gap(1.0, difference.why)


def _structure(a: str, b: str) -> Difference | None:
    if max(len(a), len(b)) > MOST_STRUCTURED:
        return None
    return compare(*sorted((a, b)))


@functools.cache
def weights() -> Mapping[str, float]:
    """Weight of each feature; `bias` stands for the point that the gap puts at 0.12."""
    text = resources.files(__package__).joinpath("weights.json").read_text(encoding="utf-8")
    found: dict[str, float] = json.loads(text)
    return found


def score(evidence: Evidence, known: Mapping[str, float]) -> float:
    """Log-odds that a pair says different things."""
    return math.fsum(known.get(name, 0.0) * value for name, value in evidence.features.items()) + known["bias"]


def _weighed(evidence: Evidence) -> Gap:
    value = 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, score(evidence, weights())))))
    return Gap(max(value, evidence.least), tuple(dict.fromkeys(evidence.why)))
