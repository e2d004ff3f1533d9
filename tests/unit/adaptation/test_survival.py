"""How many turns a session still has, and whether an adapter pays: arithmetic against known truths."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.adaptation.survival import (
    NOBODY,
    BusyTime,
    Costs,
    Lengths,
    Mean,
    Survival,
    judge_payback,
    pooled_lengths,
)
from soma_vllm.config import Payback, Prices

PRIOR = Payback(remaining_turns=6.0, weight=4.0)
COUNTS = st.dictionaries(st.integers(1, 40), st.integers(0, 500), max_size=8)


def lengths_of(sessions: list[int], live: list[int] | None = None) -> Lengths:
    return Lengths(Counter(sessions), Counter(live or []))


def geometric(hazard: float, count: int, seed: int = 0) -> list[int]:
    """Lengths of sessions that end after every turn with the same chance."""
    dice = random.Random(seed)
    lengths = []
    for _ in range(count):
        turns = 1
        while dice.random() >= hazard:
            turns += 1
        lengths.append(turns)
    return lengths


def test_without_any_session_the_configuration_is_expected_after_every_turn() -> None:
    survival = Survival(NOBODY, NOBODY, PRIOR)
    for turns in (1, 4, 100):
        assert survival.remaining(turns) == pytest.approx(6.0)


@pytest.mark.parametrize("hazard", [0.05, 0.2, 0.5])
def test_the_truth_about_many_sessions_is_found(hazard: float) -> None:
    everybody = lengths_of(geometric(hazard, 4000))
    survival = Survival(everybody, everybody, PRIOR)
    for turns in (1, 3, 6):
        assert survival.remaining(turns) == pytest.approx((1 - hazard) / hazard, rel=0.1)


def test_sessions_that_may_still_go_on_are_not_taken_for_short_ones() -> None:
    hazard = 0.1
    dice = random.Random(1)
    over, live, naive = [], [], []
    for length in geometric(hazard, 6000, seed=2):
        seen = dice.randint(1, 12)  # each session is looked at after so many turns
        naive.append(min(length, seen))
        (over if length < seen else live).append(min(length, seen))
    survival = Survival(lengths_of(over, live), NOBODY, PRIOR)
    assert survival.remaining(1) == pytest.approx((1 - hazard) / hazard, rel=0.1)
    assert Survival(lengths_of(naive), NOBODY, PRIOR).remaining(1) < 0.7 * (1 - hazard) / hazard


def test_a_live_session_says_nothing_of_its_last_turn() -> None:
    before = Survival(NOBODY, NOBODY, PRIOR).hazard(3)
    assert Survival(lengths_of([], [3] * 50), NOBODY, PRIOR).hazard(3) <= before
    assert Survival(lengths_of([3] * 50), NOBODY, PRIOR).hazard(3) > 0.9


def test_a_habit_of_ending_after_one_turn_is_seen_at_that_turn_alone() -> None:
    everybody = lengths_of([4] * 300 + [20] * 300)
    survival = Survival(everybody, everybody, PRIOR)
    assert survival.hazard(4) == pytest.approx(0.5, abs=0.05)
    assert survival.hazard(10) < 0.01
    assert survival.remaining(4) < survival.remaining(5)


def test_a_tenant_with_little_record_is_shrunk_towards_all_tenants_and_one_with_much_is_not() -> None:
    everybody = lengths_of([2] * 50 + [30] * 950)
    new = Survival(everybody, lengths_of([2]), PRIOR)
    old = Survival(everybody, lengths_of([2] * 400), PRIOR)
    shared = Survival(everybody, NOBODY, PRIOR)
    assert shared.hazard(2) < new.hazard(2) < old.hazard(2)
    assert new.hazard(2) < 0.3
    assert old.hazard(2) > 0.95


@given(over=COUNTS, live=COUNTS, turns=st.integers(1, 60))
def test_an_expectation_is_a_number_and_a_hazard_a_chance(
    over: dict[int, int], live: dict[int, int], turns: int
) -> None:
    everybody = Lengths(over, live)
    survival = Survival(everybody, everybody, PRIOR)
    assert 0.0 < survival.hazard(turns) < 1.0
    assert 0.0 < survival.remaining(turns) < 1.0e6


@given(over=COUNTS, live=COUNTS, turns=st.integers(1, 40))
def test_more_sessions_that_go_on_never_shorten_the_expectation(
    over: dict[int, int], live: dict[int, int], turns: int
) -> None:
    longer = {**live, 60: live.get(60, 0) + 10}
    before = Survival(Lengths(over, {**live, 60: live.get(60, 0)}), NOBODY, PRIOR).remaining(turns)
    assert Survival(Lengths(over, longer), NOBODY, PRIOR).remaining(turns) >= before - 1e-9


def test_tenants_are_pooled_by_length() -> None:
    pooled = pooled_lengths([Lengths({1: 2}, {3: 1}), Lengths({1: 1, 2: 1}, {})])
    assert (pooled.over, pooled.live) == ({1: 3, 2: 1}, {3: 1})


# -- costs --------------------------------------------------------------------------------------------------


def test_a_mean_begins_with_what_is_expected_and_follows_what_is_seen() -> None:
    mean = Mean(10.0, 4.0)
    for _ in range(4):
        mean = mean.with_one(20.0)
    assert mean.value == pytest.approx(15.0)
    for _ in range(1000):
        mean = mean.with_one(2.0)
    assert mean.value == pytest.approx(2.0, abs=0.2)
    for _ in range(400):
        mean = mean.with_one(8.0)
    assert mean.value > 6.0


COSTS = replace(
    Costs.expected(Payback(original_turn_s=10.0, surrogate_turn_s=2.0, training_s=30.0, admitted=1.0)),
    original_prompt_tokens=Mean(2000.0, 10.0),
    original_completion_tokens=Mean(500.0, 10.0),
    original_prefill_s=Mean(1.0, 10.0),
)


def test_an_adapter_pays_where_the_expected_turns_save_more_than_it_costs() -> None:
    for remaining, pays in ((3.0, False), (5.0, True)):
        found = judge_payback(remaining, COSTS, Prices(), audit_rate=0.0, audit_reads=False, held_out=1)
        assert found.pays is pays
        assert found.saving_per_turn == pytest.approx(8.0)
        assert found.cost == pytest.approx(32.0)
        assert found.gain == pytest.approx(8.0 * remaining)
        assert found.numbers()["remaining_turns"] == remaining


def test_audits_cost_an_answer_each_or_only_a_prefill() -> None:
    answering = judge_payback(9, COSTS, Prices(), audit_rate=0.5, audit_reads=False, held_out=1)
    reading = judge_payback(9, COSTS, Prices(), audit_rate=0.5, audit_reads=True, held_out=1)
    assert answering.saving_per_turn == pytest.approx(8.0 - 5.0)
    assert reading.saving_per_turn == pytest.approx(8.0 - 0.5)


def test_an_original_that_is_paid_by_the_token_saves_its_tokens() -> None:
    prices = Prices(original_prompt_thousand=2.0, original_completion_thousand=8.0, surrogate_second=0.1)
    found = judge_payback(9, COSTS, prices, audit_rate=0.0, audit_reads=False, held_out=1)
    assert found.saving_per_turn == pytest.approx(2.0 * 2.0 + 0.5 * 8.0 - 0.2)


def test_a_surrogate_that_saves_nothing_never_pays() -> None:
    slow = replace(COSTS, surrogate_turn_s=Mean(11.0, 4.0), training_s=Mean(0.0, 4.0))
    assert not judge_payback(1e6, slow, Prices(), audit_rate=0.0, audit_reads=False, held_out=1).pays


def test_adapters_that_the_gate_seldom_admits_must_save_more() -> None:
    doubtful = replace(COSTS, admitted=Mean(0.1, 4.0))
    assert judge_payback(10, COSTS, Prices(), audit_rate=0.0, audit_reads=False, held_out=1).pays
    assert not judge_payback(10, doubtful, Prices(), audit_rate=0.0, audit_reads=False, held_out=1).pays


@given(st.lists(st.tuples(st.floats(0, 1000), st.floats(0, 50)), max_size=40))
def test_an_engine_is_busy_for_as_long_as_any_of_its_turns_lasts(turns: list[tuple[float, float]]) -> None:
    spans = sorted((end - length, end) for end, length in turns)
    union, reached = 0.0, float("-inf")
    for begin, end in spans:
        union += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    busy = BusyTime()
    added = [busy.add(begin, end) for begin, end in sorted(spans, key=lambda span: span[1])]
    assert sum(added) == pytest.approx(union, abs=1e-6)


def test_turns_one_after_the_other_take_their_own_time_and_are_forgotten() -> None:
    busy = BusyTime()
    assert [busy.add(10.0 * n, 10.0 * n + 4.0) for n in range(3000)] == [4.0] * 3000
    assert busy.add(29_000.0, 29_999.0) == pytest.approx(999.0 - 100 * 4.0)


def test_what_a_broken_turn_took_falls_to_the_next_whole_one() -> None:
    busy = BusyTime()
    assert busy.add(0.0, 4.0, counts=False) == 0.0
    assert busy.add(2.0, 5.0) == 5.0


def test_a_clock_that_is_put_back_makes_no_engine_busier() -> None:
    busy = BusyTime()
    busy.add(0.0, 10_000.0)
    assert busy.add(4_000.0, 4_002.0) == 2.0
