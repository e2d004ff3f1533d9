"""The decision whether an adapter pays, inside an adaptation and from this server's own record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from support.services import Build, Services

from soma_vllm.adaptation.cost_model import (
    REFRESH_S,
    CostModel,
)
from soma_vllm.config import Config
from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.types import Candidate, Event, Role, Usage

AUTO = {"payback": "auto"}
LONG = {"remaining_turns": 1000.0, "training_s": 1.0}
USAGE = Usage(prompt_tokens=100, completion_tokens=10)
SHORT = {"remaining_turns": 0.01, "training_s": 100.0}


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
