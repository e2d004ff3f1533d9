"""Whether an adapter pays: arithmetic with values worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.adaptation.cost_model import (
    Average,
    BusyTime,
    Costs,
    expected_turns,
    judge_payback,
)
from soma_vllm.config import Gate, Payback, Prices
from soma_vllm.sessions.sql.records import LengthCount
from soma_vllm.types import Usage

USAGE = Usage(prompt_tokens=100, completion_tokens=10)
PRIOR = Payback(remaining_turns=6.0, weight=4.0)
COUNTS = st.dictionaries(st.integers(1, 40), st.integers(0, 500), max_size=8)


# -- expected turns -----------------------------------------------------------------------------------------


def lengths(
    over: Mapping[int, int], live: Mapping[int, int] | None = None, tenant: str = "t"
) -> list[LengthCount]:
    """Dialogues by their number of turns: those that ended, and those that may go on."""
    ended = [LengthCount(tenant, turns, True, count) for turns, count in over.items()]
    return ended + [LengthCount(tenant, turns, False, count) for turns, count in (live or {}).items()]


def geometric(hazard: float, count: int, seed: int = 0) -> list[int]:
    """Lengths of dialogues that end after every turn with the same chance."""
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        turns = 1
        while dice.random() >= hazard:
            turns += 1
        found.append(turns)
    return found


def test_without_any_dialogue_the_configuration_is_expected_after_every_turn() -> None:
    for turns in (1, 4, 100):
        assert expected_turns([], turns, PRIOR) == pytest.approx(6.0)


def test_the_expectation_is_a_mean_of_further_turns_shrunken_by_the_prior() -> None:
    record = lengths({2: 3, 7: 1}, {5: 2})
    # The prior is four dialogues of six further turns. After turn 2, one of four that ended went on for 5,
    # and two that may still go on have gone on for 3 each: (4 * 6 + 5 + 2 * 3) / (4 + 4).
    assert expected_turns(record, 2, PRIOR) == pytest.approx(35 / 8)
    # After turn 3 the three short ones say nothing: (4 * 6 + 4 + 2 * 2) / (4 + 1).
    assert expected_turns(record, 3, PRIOR) == pytest.approx(32 / 5)
    # No dialogue has more than seven turns.
    assert expected_turns(record, 8, PRIOR) == pytest.approx(6.0)


@pytest.mark.parametrize("hazard", [0.05, 0.2, 0.5])
def test_the_truth_about_many_dialogues_is_found(hazard: float) -> None:
    record = [LengthCount("t", turns, True, 1) for turns in geometric(hazard, 40_000)]
    for turns in (1, 3, 6):
        assert expected_turns(record, turns, PRIOR) == pytest.approx((1 - hazard) / hazard, rel=0.1)


def test_dialogues_that_may_still_go_on_are_not_taken_for_short_ones() -> None:
    hazard = 0.1
    dice = random.Random(1)
    seen = [(length, dice.randint(1, 12)) for length in geometric(hazard, 6000, seed=2)]
    record = [LengthCount("t", min(length, when), length < when, 1) for length, when in seen]
    naive = [LengthCount("t", min(length, when), True, 1) for length, when in seen]
    assert expected_turns(record, 1, PRIOR) == pytest.approx((1 - hazard) / hazard, rel=0.1)
    assert expected_turns(naive, 1, PRIOR) < 0.7 * (1 - hazard) / hazard


def test_a_live_dialogue_says_nothing_of_what_follows_its_last_turn() -> None:
    assert expected_turns(lengths({}, {3: 50}), 3, PRIOR) == pytest.approx(6.0)
    assert expected_turns(lengths({3: 50}), 3, PRIOR) == pytest.approx(24 / 54)


def test_a_habit_of_ending_after_one_turn_is_seen_up_to_that_turn_alone() -> None:
    record = lengths({4: 300, 20: 300})
    assert expected_turns(record, 4, PRIOR) == pytest.approx((24 + 300 * 16) / 604)
    assert expected_turns(record, 5, PRIOR) == pytest.approx((24 + 300 * 15) / 304)


def test_dialogues_of_all_tenants_count_alike() -> None:
    shared = lengths({2: 50}, tenant="a") + lengths({30: 950}, tenant="b")
    assert expected_turns(shared, 2, PRIOR) == expected_turns(lengths({2: 50, 30: 950}), 2, PRIOR)


def test_few_dialogues_weigh_less_than_the_configuration_and_many_more() -> None:
    assert expected_turns(lengths({2: 1}), 2, PRIOR) == pytest.approx(24 / 5)
    assert expected_turns(lengths({2: 400}), 2, PRIOR) < 0.1


@given(over=COUNTS, live=COUNTS, turns=st.integers(1, 60))
def test_an_expectation_is_a_positive_number(over: dict[int, int], live: dict[int, int], turns: int) -> None:
    assert 0.0 < expected_turns(lengths(over, live), turns, PRIOR) < 1.0e6


@given(over=COUNTS, live=COUNTS, turns=st.integers(1, 40))
def test_more_dialogues_that_go_on_never_shorten_the_expectation(
    over: dict[int, int], live: dict[int, int], turns: int
) -> None:
    record = lengths(over, live)
    before = expected_turns(record, turns, PRIOR)
    assert expected_turns(record + lengths({}, {60: 10}), turns, PRIOR) >= before


# -- costs --------------------------------------------------------------------------------------------------


def test_an_average_begins_with_what_is_expected_and_follows_what_is_seen() -> None:
    average = Average(10.0, 4.0)
    for _ in range(4):
        average.add(20.0)
    assert average.value == pytest.approx(15.0)
    average.add(None)
    assert (average.value, average.weight) == (pytest.approx(15.0), 8.0)
    for _ in range(1000):
        average.add(2.0)
    assert average.value == pytest.approx(2.0, abs=0.2)
    average.add(2.0 + 201.0)  # exponential by now: one of 201 parts
    assert average.value == pytest.approx(3.0, abs=0.2)
    for _ in range(400):
        average.add(8.0)
    assert average.value > 6.0


def costs(**values: float) -> Costs:
    found = Costs(Payback(original_turn_s=10.0, surrogate_turn_s=2.0, training_s=30.0, admitted=1.0))
    known = {"original_prompt_tokens": 2000.0, "original_completion_tokens": 500.0, "original_prefill_s": 1.0}
    for name, value in {**known, **values}.items():
        getattr(found, name).value = value
    return found


UNAUDITED = Gate(audit_rate=0.0)


def test_an_adapter_pays_where_the_expected_turns_save_more_than_it_costs() -> None:
    for remaining, pays in ((3.0, False), (5.0, True)):
        found = judge_payback(remaining, costs(), Prices(), UNAUDITED, held_out=1)
        assert found.pays is pays
        assert found.saving_per_turn == pytest.approx(8.0)
        assert found.cost == pytest.approx(32.0)
        assert found.gain == pytest.approx(8.0 * remaining)
        assert found.numbers() == {
            "pays": pays,
            "gain": 8.0 * remaining,
            "remaining_turns": remaining,
            "saving_per_turn": 8.0,
            "admitted": 1.0,
            "cost": 32.0,
        }


def test_audits_cost_an_answer_each_or_only_a_prefill() -> None:
    answering = judge_payback(9, costs(), Prices(), Gate(audit_rate=0.5), held_out=1)
    reading = judge_payback(9, costs(), Prices(), Gate(audit_rate=0.5, audit="score"), held_out=1)
    assert answering.saving_per_turn == pytest.approx(8.0 - 5.0)
    assert reading.saving_per_turn == pytest.approx(8.0 - 0.5)


def test_an_original_that_is_paid_by_the_token_saves_its_tokens() -> None:
    prices = Prices(original_prompt_thousand=2.0, original_completion_thousand=8.0, surrogate_second=0.1)
    found = judge_payback(9, costs(), prices, UNAUDITED, held_out=1)
    assert found.saving_per_turn == pytest.approx(2.0 * 2.0 + 0.5 * 8.0 - 0.2)


def test_a_surrogate_that_saves_nothing_never_pays() -> None:
    slow = costs(surrogate_turn_s=11.0, training_s=0.0)
    assert not judge_payback(1e6, slow, Prices(), UNAUDITED, held_out=1).pays


def test_adapters_that_the_gate_seldom_admits_must_save_more() -> None:
    assert judge_payback(10, costs(), Prices(), UNAUDITED, held_out=1).pays
    assert not judge_payback(10, costs(admitted=0.1), Prices(), UNAUDITED, held_out=1).pays


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
