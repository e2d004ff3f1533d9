"""The budget: a minute's worth at once, then the rate, and nothing more."""

from __future__ import annotations

import random

import pytest

from soma_vllm.adaptation.token_bucket import TokenBucket


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_worth_is_granted_at_once_and_then_the_rate() -> None:
    clock = Clock()
    budget = TokenBucket(6.0, clock)
    assert [budget.take() for _ in range(8)] == [True] * 6 + [False] * 2
    clock.now += 10.0
    assert [budget.take() for _ in range(2)] == [True, False]


def test_a_rate_below_one_a_minute_still_grants_one() -> None:
    clock = Clock()
    budget = TokenBucket(0.5, clock)
    assert [budget.take() for _ in range(2)] == [True, False]
    clock.now += 119.0
    assert not budget.take()
    clock.now += 1.0
    assert budget.take()


def test_a_long_pause_saves_up_a_minutes_worth_only() -> None:
    clock = Clock()
    budget = TokenBucket(3.0, clock)
    clock.now += 86_400.0
    assert sum(budget.take() for _ in range(100)) == 3


@pytest.mark.parametrize("seed", range(10))
def test_no_span_of_time_gets_more_than_the_bucket_and_its_rate(seed: int) -> None:
    dice = random.Random(seed)
    rate = dice.choice([0.3, 1.0, 7.0, 30.0])
    clock = Clock()
    budget = TokenBucket(rate, clock)
    granted = []
    for _ in range(400):
        clock.now += dice.expovariate(0.5)
        if budget.take():
            granted.append(clock.now)
    most = max(1.0, rate)
    for first in range(len(granted)):
        for last in range(first, len(granted)):
            span_min = (granted[last] - granted[first]) / 60.0
            assert last - first + 1 <= most + rate * span_min + 1e-6
    assert granted
