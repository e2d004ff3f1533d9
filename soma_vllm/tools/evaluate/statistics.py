"""The two statistics of a comparison: a paired bootstrap over sessions, and ROUGE-L over words. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
LEAST_PAIRS = 6
"""Fewer pairs that all fall to one side by chance, which n do with probability 2^(1-n), would exclude zero more
often than the 5 % that the interval promises."""


def interval(
    differences: Sequence[float], seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of a mean paired difference; None for fewer than `LEAST_PAIRS`.

    `differences` holds one number per session: sessions are drawn, with replacement, and not turns, because
    the turns of a session are not independent (Efron and Tibshirani, An Introduction to the Bootstrap, ch. 13).
    """
    if len(differences) < LEAST_PAIRS:
        return None
    values = np.asarray(differences, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, in [0, 1] (Lin 2004, ROUGE-L with beta = 1).

    Words are runs of letters and digits without case. Texts without words agree when they are equal.
    """
    found, expected = _words(answer), _words(reference)
    if not found or not expected:
        return float(not found and not expected and answer.strip() == reference.strip())
    common = _longest_common(found, expected)
    return 2.0 * common / (len(found) + len(expected))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())


def _longest_common(these: Sequence[str], those: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(those) + 1)
    for word in these:
        diagonal = 0
        for column, other in enumerate(those, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]
