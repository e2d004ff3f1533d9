"""Whether an adapter pays: arithmetic with values worked out by hand, and the decision inside an adaptation."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.services import Build, Services

from soma_vllm.adaptation.cost_model import (
    REFRESH_S,
    Average,
    BusyTime,
    CostModel,
    Costs,
    expected_turns,
    judge_payback,
)
from soma_vllm.config import Config, Gate, Payback, Prices
from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.sql.records import LengthCount
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.types import Candidate, Event, Role, Usage

AUTO = {"payback": "auto"}
LONG = {"remaining_turns": 1000.0, "training_s": 1.0}
USAGE = Usage(prompt_tokens=100, completion_tokens=10)
SHORT = {"remaining_turns": 0.01, "training_s": 100.0}

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


# -- the decision, from this server's own record ------------------------------------------------------------


def model(services: Services, store: Any = None, **options: Any) -> CostModel:
    """A cost model as the server makes one."""
    config: Config = services.config
    store = store or services.store
    return CostModel(config.payback, config.prices, config.gate, config.acceptance_min_turns, store, **options)


def turn(engine: str, latency: float, at: float, ttft: float | None = None) -> Event:
    answered = Turn(
        number=1,
        messages=(),
        answer="",
        engine=Role(engine),
        adapter=None,
        phase=Phase.WARM_START,
        reason="test",
        usage=USAGE,
        ttft_s=ttft,
        latency_s=latency,
    )
    return turn_event(answered, 0, at)


async def warmed(services: Services, session: str = "s", **extra: Any) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}", session, **extra)
    await services.settled()
    return history


def event(services: Services, kind: str) -> Mapping[str, Any]:
    (found,) = (event.data for _, event in services.events if event.kind == kind)
    return found


async def test_an_adapter_is_trained_where_the_expected_turns_pay_for_it(build: Build) -> None:
    services = build(adaptation=AUTO, payback=LONG)
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    await warmed(services)
    assert services.session().serving is Candidate.ADAPTER
    judged = event(services, "payback_judged")
    assert judged["pays"] is True
    assert judged["gain"] > judged["cost"]
    assert {"remaining_turns", "saving_per_turn", "cost", "admitted"} <= judged.keys()


async def test_a_session_that_is_not_worth_an_adapter_stays_with_the_original_and_says_why(
    build: Build,
) -> None:
    services = build(adaptation=AUTO, payback=SHORT)
    await services.registry.start()
    services.surrogate.answers = ["different"]
    await warmed(services)
    assert services.trainer.requests == []
    assert services.session().phase is Phase.ORIGINAL_ONLY
    assert event(services, "payback_judged")["pays"] is False
    reason = event(services, "refused")["reason"]
    assert "plain: gap" in reason
    assert "does not cover its cost" in reason


async def test_a_plain_surrogate_that_passes_is_admitted_whatever_an_adapter_would_cost(build: Build) -> None:
    services = build(adaptation=AUTO, payback=SHORT)
    await services.registry.start()
    await warmed(services)
    assert services.session().serving is Candidate.PLAIN
    assert "payback_judged" not in services.kinds()


async def test_without_the_plain_surrogate_as_a_candidate_the_original_keeps_what_does_not_pay(
    build: Build,
) -> None:
    services = build(adaptation={**AUTO, "candidates": ["adapter"]}, payback=SHORT)
    await services.registry.start()
    await warmed(services)
    assert services.session().phase is Phase.ORIGINAL_ONLY


@pytest.mark.parametrize(("mode", "trainings"), [("always", 1), ("never", 0)])
async def test_always_and_never_do_not_ask(build: Build, mode: str, trainings: int) -> None:
    services = build(adaptation={"payback": mode}, payback=SHORT if mode == "always" else LONG)
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    await warmed(services)
    assert len(services.trainer.requests) == trainings
    assert "payback_judged" not in services.kinds()


async def test_a_study_that_forces_an_adapter_gets_one(build: Build) -> None:
    services = build(adaptation=AUTO, payback=SHORT)
    await services.registry.start()
    await warmed(services, headers={"x-soma-force": "adapter"})
    assert services.session().serving is Candidate.ADAPTER


async def test_a_restarted_server_still_knows_how_long_its_sessions_are(build: Build) -> None:
    first = build(adaptation=AUTO)
    await first.registry.start()
    for number in range(30):
        await first.say([], "only one question", f"short-{number}")
    history: list[dict[str, Any]] = []
    for number in range(12):
        await first.say(history, f"question {number}", "long", model="soma:original")
    await first.registry.written()
    session = first.session("short-0")
    # A clock beyond `over_after_s`: to it every session on record is over. The configuration expects 8 turns
    # with the weight of 4 sessions, and of 31 that ended one went on for 11.
    judged = await model(first, clock=lambda: 4.0e9).judge(session)
    assert judged.remaining_turns == pytest.approx((4 * 8 + 11) / (4 + 31))
    early = await model(first, clock=lambda: 0.0).judge(session)
    assert early.remaining_turns == pytest.approx(8.0)


async def test_sessions_of_this_moment_do_not_promise_that_all_will_last(build: Build) -> None:
    services = build(payback={"remaining_turns": 5.0})
    await services.registry.start()
    for number in range(20):
        history: list[dict[str, Any]] = []
        for question in range(4):
            await services.say(history, f"question {question}", f"s-{number}", model="soma:original")
    await services.registry.written()
    judged = await model(services).judge(services.session("s-0"))
    assert judged.remaining_turns == pytest.approx(5.0)  # which of them are over is not known yet


async def test_concurrent_turns_share_their_engines_time(build: Build) -> None:
    services = build(payback={"original_turn_s": 1.0, "surrogate_turn_s": 0.001})
    await services.registry.start()
    await services.say([], "question")
    alone, crowded = (model(services) for _ in range(2))
    for number in range(400):
        alone(services.session().key, turn("original", 8.0, 10.0 * number, ttft=4.0))
        crowded(services.session().key, turn("original", 8.0, 2.0 * number, ttft=4.0))  # four at a time
    saving = [(await watch.judge(services.session())).saving_per_turn for watch in (alone, crowded)]
    assert saving == pytest.approx([8.0, 2.0], rel=0.05)


async def test_the_record_is_read_at_most_once_a_minute_and_outages_leave_the_last_reading(
    build: Build,
) -> None:
    services = build()
    await services.registry.start()
    await services.say([], "question")
    now = [1000.0]
    reads = []

    class Watched:
        async def lengths(self, over_before: float) -> Any:
            reads.append(over_before)
            if len(reads) > 1:
                raise StoreUnavailable("away")
            return await services.store.lengths(4.0e9)

    watch = model(services, Watched(), clock=lambda: now[0])
    first = await watch.judge(services.session())
    assert await watch.judge(services.session()) == first
    assert len(reads) == 1
    now[0] += REFRESH_S
    assert await watch.judge(services.session()) == first
    assert len(reads) == 2


async def test_costs_are_learned_from_turns_trainings_and_verdicts(build: Build) -> None:
    services = build()
    watch = model(services)
    await services.registry.start()
    await services.say([], "question")
    before = await watch.judge(services.session())

    key = services.session().key
    for number in range(100):
        watch(key, turn("original", 30.0, 100.0 * number))
        watch(key, turn("surrogate", 3.0, 100.0 * number))
        watch(key, Event("trained", 0.0, {"mining_s": 1.0, "finetune_s": 2.0, "scoring_s": 3.0}))
        numbers = {"candidates": {"plain": {"passes": False}, "adapter": {"passes": True}}}
        watch(key, Event("judged", 0.0, {"candidate": "adapter", "numbers": numbers}))
    watch(key, Event("judged", 0.0, {"candidate": "plain", "numbers": {"candidates": {"plain": {}}}}))
    after = await watch.judge(services.session())
    assert after.saving_per_turn == pytest.approx(27.0, rel=0.1)
    assert after.cost == pytest.approx(6.0 + 3.0, rel=0.2)
    assert after.admitted == pytest.approx(1.0, abs=0.05)
    assert after.remaining_turns == before.remaining_turns
