"""The two statistics of an evaluation, against cases one can work out by hand."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import numpy as np
import pytest

from soma_vllm.tools.evaluate.statistics import LEAST_PAIRS, interval, rouge_l


def test_equal_differences_leave_no_doubt() -> None:
    assert interval([0.25] * LEAST_PAIRS) == (0.25, 0.25)


def test_so_few_sessions_that_chance_puts_all_on_one_side_have_no_interval() -> None:
    assert interval([]) is None
    assert interval([0.3] * (LEAST_PAIRS - 1)) is None
    assert 2.0 ** (1 - LEAST_PAIRS) < 0.05 < 2.0 ** (2 - LEAST_PAIRS)


def test_the_interval_is_that_of_all_possible_resamples() -> None:
    # Six sessions have 46,656 resamples: their exact percentiles are what drawing at random comes to.
    differences = [-0.4, 0.1, 0.2, 0.9, -0.1, 0.5]
    means = [fmean(resample) for resample in itertools.product(differences, repeat=6)]
    low, high = interval(differences) or (math.nan, math.nan)
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.03)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.03)


def test_many_sessions_agree_with_the_normal_interval() -> None:
    differences = np.random.default_rng(3).normal(0.1, 0.5, size=400)
    low, high = interval(differences.tolist()) or (math.nan, math.nan)
    half = 1.96 * differences.std() / math.sqrt(len(differences))
    assert (low, high) == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.006)


def test_the_interval_is_seeded() -> None:
    differences = np.random.default_rng(3).normal(size=30).tolist()
    assert interval(differences, seed=1) == interval(differences, seed=1)
    assert interval(differences, seed=1) != interval(differences, seed=2)


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("The cat, sat!", "the cat sat", 1.0),
        # common: "police the gunman" (3 of 4 and 3 of 4 words)
        ("police ended the gunman", "police kill the gunman", 3 / 4),
        # common: "the gunman", as in Lin's example of a reordered sentence
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        # 2 common of 2 and 6 words: precision 1, recall 1/3
        ("a c", "a b c d e f", 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("x y", "a b", 0.0),
        ("", "a b", 0.0),
        ("", "", 1.0),
        ("{}", "{}", 1.0),
        ("{}", "[]", 0.0),
        ("Straße größer", "STRASSE größer", 1.0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(
    answer: str, reference: str, expected: float
) -> None:
    assert rouge_l(answer, reference) == pytest.approx(expected)
