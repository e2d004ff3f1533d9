"""The surrogate answers warm turns while the original does: which ones, and what becomes of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from support.guard import GUARD_S
from support.services import Build, Services

from soma_vllm.engines.engine import ChatCall, Reply
from soma_vllm.errors import EngineUnavailable
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import Agreement, Message, SessionKey


async def started(build: Build, **changes: Any) -> Services:
    services = build(**{"warm_window": 4, "acceptance_min_turns": 2, **changes})
    await services.registry.start()
    return services


async def talked(services: Services, turns: int, **extra: Any) -> list[dict[str, Any]]:
    """The history of a dialogue of so many turns."""
    history: list[dict[str, Any]] = []
    for number in range(1, turns + 1):
        await services.say(history, f"question {number}", **extra)
    return history


def asked(services: Services) -> list[str]:
    """The queries that the surrogate answered as shadow traffic."""
    calls = [call.body for call in services.surrogate.calls if call.background]
    return [body["messages"][-1]["content"] for body in calls if body["max_tokens"] != 1]


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until this holds."""
    async with asyncio.timeout(GUARD_S):
        while not condition():
            await asyncio.sleep(0)


async def test_a_held_out_turn_is_answered_while_the_original_answers_it_and_never_again(build: Build) -> None:
    services = await started(build)
    history = await talked(services, 3)
    services.original.go.clear()
    services.original.called.clear()
    waiting = asyncio.create_task(services.say(history, "question 4"))
    await services.original.called.wait()
    await until(lambda: len(asked(services)) == 4)
    assert asked(services) == [f"question {number}" for number in (1, 2, 3, 4)]  # the original is still silent
    services.original.go.set()
    await waiting
    await services.settled()
    assert services.session().phase is Phase.SWITCHED
    assert len(asked(services)) == 4


async def test_a_shadow_answer_is_evidence_only(build: Build) -> None:
    services = await started(build)
    services.surrogate.answers = ["different"]
    history: list[dict[str, Any]] = []
    engines = [
        (await services.say(history, f"question {number}")).headers["X-SOMA-Engine"] for number in range(1, 5)
    ]
    assert engines == ["original"] * 4
    assert {message["content"] for message in history if message["role"] == "assistant"} == {"same"}
    await services.settled()
    (judged,) = [event.data for _, event in services.events if event.kind == "judged"]
    assert judged["numbers"]["candidates"]["plain"]["gaps"] == [1.0, 1.0]


async def test_a_rewritten_turn_is_judged_on_what_was_really_asked(build: Build) -> None:
    services = await started(build)
    history = await talked(services, 3)
    del history[-2:]
    await services.say(history, "question 3, put otherwise")
    await services.say(history, "question 4")
    await services.settled()
    (switched,) = [key for key, event in services.events if event.kind == "switched"]
    assert switched == services.session().key  # the line goes on from the question that replaced the third
    assert [query for query in asked(services) if query not in ("question 1", "question 2")] == [
        "question 3",
        "question 3, put otherwise",
        "question 4",
    ]


async def test_a_shadow_answer_that_failed_is_requested_again(build: Build) -> None:
    services = await started(build)
    history: list[dict[str, Any]] = []
    services.surrogate.refusal = EngineUnavailable("not yet")
    for number in (1, 2, 3):
        await services.say(history, f"question {number}")
    await until(lambda: len(asked(services)) == 3)
    services.surrogate.refusal = None
    await services.say(history, "question 4")
    await services.settled()
    assert services.session().phase is Phase.SWITCHED
    assert asked(services) == [f"question {number}" for number in (1, 2, 3, 4, 1, 2, 3)]


async def test_the_plain_surrogate_is_judged_on_the_whole_warm_start(build: Build) -> None:
    services = await started(build, gate={"accept_threshold": 0.3}, adaptation={"payback": "never"})
    # Wrong on one of the two held-out turns: too much for a half, not for a quarter.
    services.surrogate.answers = ["same", "same", "different", "same"]
    await talked(services, 4)
    await services.settled()
    (judged,) = [event.data for _, event in services.events if event.kind == "judged"]
    plain = judged["numbers"]["candidates"]["plain"]
    assert (plain["turns"], plain["gaps"]) == ([1, 2, 3, 4], [0.0, 0.0, 1.0, 0.0])
    assert services.session().phase is Phase.SWITCHED


async def test_what_fell_short_on_the_whole_is_not_let_through_by_its_held_out_part(build: Build) -> None:
    services = await started(build, adaptation={"payback": "always"})
    # Wrong on turn 2 alone, which is not held out; the adapter is right.
    services.surrogate.answers = ["same", "different", "same"]
    await talked(services, 4)
    await services.settled()
    assert services.session().serving == "adapter"


async def test_there_is_no_shadow_traffic_where_nothing_will_be_judged(build: Build) -> None:
    services = await started(build)
    await talked(services, 4, headers={"x-soma-policy": "history_ft"})
    assert asked(services) == []


async def test_what_is_removed_is_forgotten_and_what_runs_is_ended(build: Build) -> None:
    services = await started(build)
    services.surrogate.go.clear()
    await talked(services, 3)
    key: SessionKey = services.session().key
    await asyncio.sleep(0)
    assert services.shadow_traffic._answers.keys() == {key}
    await services.session_admin.remove(key)
    await asyncio.wait_for(services.surrogate.closed_early.wait(), GUARD_S)
    assert not services.shadow_traffic._answers


async def test_stopping_ends_all_shadow_traffic(build: Build) -> None:
    services = await started(build)
    services.surrogate.go.clear()
    await talked(services, 3)
    await asyncio.sleep(0)
    await services.shadow_traffic.stop()
    assert services.surrogate.closed_early.is_set()


async def test_the_engine_reads_the_held_out_answers_and_no_trainer_is_asked(build: Build) -> None:
    services = await started(build, gate={"min_agreement": 0.8})
    services.surrogate.finds = Agreement(0.25, 0.9, 10)
    await talked(services, 4)
    await services.settled()
    (judged,) = [event.data for _, event in services.events if event.kind == "judged"]
    plain = judged["numbers"]["candidates"]["plain"]
    assert (plain["nll"], plain["top1"]) == (0.25, 0.9)
    assert services.trainer.requests == []


async def test_a_refused_session_has_shadow_traffic_again_when_its_next_verdict_is_near(build: Build) -> None:
    services = await started(build, adaptation={"cool_down_turns": 4, "candidates": ["plain"]})
    services.surrogate.answers = ["different"]
    history = await talked(services, 4)
    await services.settled()
    assert services.session().phase is Phase.ORIGINAL_ONLY
    services.surrogate.answers = ["same"]
    before = len(asked(services))
    for number in range(5, 9):
        await services.say(history, f"question {number}")
    await services.settled()
    assert asked(services)[before:] == [f"question {number}" for number in (5, 6, 7, 8)]
    assert services.session().phase is Phase.SWITCHED


async def test_the_shadow_answers_of_one_verdict_serve_the_next(build: Build) -> None:
    services = await started(build, adaptation={"cool_down_turns": 2, "candidates": ["plain"]})
    services.surrogate.answers = ["different", "different", "same"]
    history = await talked(services, 4)
    await services.settled()
    assert services.session().phase is Phase.ORIGINAL_ONLY
    for number in (5, 6):
        await services.say(history, f"question {number}")
    await services.settled()
    assert services.session().phase is Phase.SWITCHED  # on turns 3 to 6
    assert asked(services) == [f"question {number}" for number in range(1, 7)]


@dataclass
class Prefills:
    """What is read into the surrogate's cache after a switch, and when that ends."""

    prompts: list[list[Message]] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    failure: EngineUnavailable | None = None

    def at(self, services: Services) -> Prefills:
        chat = services.surrogate.chat

        async def watched(call: ChatCall) -> Reply:
            if call.background and call.body["max_tokens"] == 1:
                self.prompts.append(list(call.body["messages"]))
                await self.go.wait()
                if self.failure is not None:
                    raise self.failure
            answer: Reply = await chat(call)
            return answer

        services.surrogate.chat = watched
        return self


async def test_a_user_who_is_quicker_than_the_prefill_is_answered_by_the_surrogate(build: Build) -> None:
    services = await started(build)
    prefills = Prefills().at(services)
    history = await talked(services, 4)
    await until(lambda: bool(prefills.prompts))
    assert (await services.say(history, "question 5")).headers["X-SOMA-Engine"] == "surrogate"
    assert not prefills.go.is_set()
    prefills.go.set()
    await services.settled()


async def test_a_cache_that_could_not_be_warmed_does_not_undo_the_switch(build: Build) -> None:
    services = await started(build)
    prefills = Prefills(failure=EngineUnavailable("busy")).at(services)
    prefills.go.set()
    await talked(services, 4)
    await services.settled()
    assert prefills.prompts
    assert services.session().phase is Phase.SWITCHED
    assert "training_failed" not in services.kinds()


@pytest.mark.parametrize("text", ["session", "until_adapted", "never"])
async def test_the_cache_is_warmed_with_what_was_said_however_long_that_is_kept(
    build: Build, text: str
) -> None:
    services = await started(build, retention={"text": text})
    prefills = Prefills().at(services)
    prefills.go.set()
    history = await talked(services, 4)
    await services.settled()
    (prompt,) = prefills.prompts
    assert prompt[:-1] == history


@pytest.mark.parametrize(("text", "kept"), [("session", 4), ("until_adapted", 0), ("never", 0)])
async def test_no_shadow_answer_outlives_the_text_it_answers(build: Build, text: str, kept: int) -> None:
    services = await started(build, adaptation={"candidates": ["plain"]}, retention={"text": text})
    services.surrogate.answers = ["different"]
    await talked(services, 4)
    await services.settled()
    assert services.session().phase is Phase.ORIGINAL_ONLY
    assert sum(len(made) for made in services.shadow_traffic._answers.values()) == kept


async def test_a_sweep_forgets_shadow_answers_as_old_as_the_text_it_erases(build: Build) -> None:
    services = await started(build, retention={"text_ttl_s": 0.01})
    await talked(services, 3)
    assert services.shadow_traffic._answers
    await asyncio.sleep(0.02)
    await services.retention.sweep()
    assert not services.shadow_traffic._answers
