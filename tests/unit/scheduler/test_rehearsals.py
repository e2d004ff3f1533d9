"""The surrogate answers warm turns while the original does: what is rehearsed, and what is made of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from guard import GUARD_S  # type: ignore[import-not-found]
from scheduler_house import Build, House  # type: ignore[import-not-found]

from soma_vllm.engines.base import ChatCall, Reply
from soma_vllm.errors import EngineUnavailable
from soma_vllm.session.phases import Phase
from soma_vllm.types import Agreement, Message, SessionKey


async def started(build: Build, **changes: Any) -> House:
    house = build(**{"warm_window": 4, "acceptance_min_turns": 2, **changes})
    await house.book.start()
    return house


async def talked(house: House, turns: int, **extra: Any) -> list[dict[str, Any]]:
    """The history of a dialogue of so many turns."""
    history: list[dict[str, Any]] = []
    for number in range(1, turns + 1):
        await house.say(history, f"question {number}", **extra)
    return history


def asked(house: House) -> list[str]:
    """The queries that the surrogate answered for nobody."""
    calls = [call.body for call in house.surrogate.calls if call.background]
    return [body["messages"][-1]["content"] for body in calls if body["max_tokens"] != 1]


async def until(condition: Callable[[], bool]) -> None:
    """Let others run until this holds."""
    async with asyncio.timeout(GUARD_S):
        while not condition():
            await asyncio.sleep(0)


async def test_a_held_out_turn_is_answered_beside_the_original_and_never_again(build: Build) -> None:
    house = await started(build)
    history = await talked(house, 3)
    house.original.go.clear()
    house.original.called.clear()
    waiting = asyncio.create_task(house.say(history, "question 4"))
    await house.original.called.wait()
    await until(lambda: len(asked(house)) == 4)
    assert asked(house) == [f"question {number}" for number in (1, 2, 3, 4)]  # the original is still silent
    house.original.go.set()
    await waiting
    await house.settled()
    assert house.session().phase is Phase.SWITCHED
    assert len(asked(house)) == 4


async def test_a_rehearsal_is_evidence_only(build: Build) -> None:
    house = await started(build)
    house.surrogate.answers = ["different"]
    history: list[dict[str, Any]] = []
    engines = [
        (await house.say(history, f"question {number}")).headers["X-SOMA-Engine"] for number in range(1, 5)
    ]
    assert engines == ["original"] * 4
    assert {message["content"] for message in history if message["role"] == "assistant"} == {"same"}
    await house.settled()
    (judged,) = [event.data for _, event in house.events if event.kind == "judged"]
    assert judged["numbers"]["candidates"]["plain"]["gaps"] == [1.0, 1.0]


async def test_a_rewritten_turn_is_judged_on_what_was_really_asked(build: Build) -> None:
    house = await started(build)
    history = await talked(house, 3)
    del history[-2:]
    await house.say(history, "question 3, put otherwise")
    await house.say(history, "question 4")
    await house.settled()
    (branch,) = [key for key, event in house.events if event.kind == "switched"]
    assert branch != house.session().key  # which has the turn as it was
    assert [query for query in asked(house) if query not in ("question 1", "question 2")] == [
        "question 3",
        "question 3, put otherwise",
        "question 4",
    ]


async def test_a_rehearsal_that_failed_is_made_again(build: Build) -> None:
    house = await started(build)
    history: list[dict[str, Any]] = []
    house.surrogate.refusal = EngineUnavailable("not yet")
    for number in (1, 2, 3):
        await house.say(history, f"question {number}")
    await until(lambda: len(asked(house)) == 3)
    house.surrogate.refusal = None
    await house.say(history, "question 4")
    await house.settled()
    assert house.session().phase is Phase.SWITCHED
    assert asked(house) == [f"question {number}" for number in (1, 2, 3, 4, 1, 2, 3)]


async def test_the_plain_surrogate_is_judged_on_the_whole_warm_start(build: Build) -> None:
    house = await started(build, gate={"accept_threshold": 0.3}, adaptation={"payback": "never"})
    # Wrong on one of the two held-out turns: too much for a half, not for a quarter.
    house.surrogate.answers = ["same", "same", "different", "same"]
    await talked(house, 4)
    await house.settled()
    (judged,) = [event.data for _, event in house.events if event.kind == "judged"]
    plain = judged["numbers"]["candidates"]["plain"]
    assert (plain["turns"], plain["gaps"]) == ([1, 2, 3, 4], [0.0, 0.0, 1.0, 0.0])
    assert house.session().phase is Phase.SWITCHED


async def test_what_fell_short_on_the_whole_is_not_let_through_by_its_held_out_part(build: Build) -> None:
    house = await started(build, adaptation={"payback": "always"})
    # Wrong on turn 2 alone, which is not held out; the adapter is right.
    house.surrogate.answers = ["same", "different", "same"]
    await talked(house, 4)
    await house.settled()
    assert house.session().serving == "adapter"


async def test_nothing_is_rehearsed_where_nothing_will_be_judged(build: Build) -> None:
    house = await started(build)
    await talked(house, 4, headers={"x-soma-policy": "history_ft"})
    assert asked(house) == []


async def test_what_is_removed_is_forgotten_and_what_runs_is_ended(build: Build) -> None:
    house = await started(build)
    house.surrogate.go.clear()
    await talked(house, 3)
    key: SessionKey = house.session().key
    await asyncio.sleep(0)
    assert house.rehearsals._of.keys() == {key}
    await house.custody.remove(key)
    await asyncio.wait_for(house.surrogate.closed_early.wait(), GUARD_S)
    assert not house.rehearsals._of


async def test_stopping_ends_every_rehearsal(build: Build) -> None:
    house = await started(build)
    house.surrogate.go.clear()
    await talked(house, 3)
    await asyncio.sleep(0)
    await house.rehearsals.stop()
    assert house.surrogate.closed_early.is_set()


async def test_the_engine_reads_the_held_out_answers_and_no_trainer_is_asked(build: Build) -> None:
    house = await started(build, gate={"min_agreement": 0.8})
    house.surrogate.finds = Agreement(0.25, 0.9, 10)
    await talked(house, 4)
    await house.settled()
    (judged,) = [event.data for _, event in house.events if event.kind == "judged"]
    plain = judged["numbers"]["candidates"]["plain"]
    assert (plain["nll"], plain["top1"]) == (0.25, 0.9)
    assert house.trainer.requests == []


async def test_a_refused_session_is_rehearsed_again_where_its_next_verdict_is_near(build: Build) -> None:
    house = await started(build, adaptation={"cool_down_turns": 4, "candidates": ["plain"]})
    house.surrogate.answers = ["different"]
    history = await talked(house, 4)
    await house.settled()
    assert house.session().phase is Phase.ORIGINAL_ONLY
    house.surrogate.answers = ["same"]
    before = len(asked(house))
    for number in range(5, 9):
        await house.say(history, f"question {number}")
    await house.settled()
    assert asked(house)[before:] == [f"question {number}" for number in (5, 6, 7, 8)]
    assert house.session().phase is Phase.SWITCHED


async def test_what_was_rehearsed_for_one_verdict_serves_the_next(build: Build) -> None:
    house = await started(build, adaptation={"cool_down_turns": 2, "candidates": ["plain"]})
    house.surrogate.answers = ["different", "different", "same"]
    history = await talked(house, 4)
    await house.settled()
    assert house.session().phase is Phase.ORIGINAL_ONLY
    for number in (5, 6):
        await house.say(history, f"question {number}")
    await house.settled()
    assert house.session().phase is Phase.SWITCHED  # on turns 3 to 6
    assert asked(house) == [f"question {number}" for number in range(1, 7)]


@dataclass
class Prefills:
    """What is read into the surrogate's cache after a switch, and when that ends."""

    prompts: list[list[Message]] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    failure: EngineUnavailable | None = None

    def at(self, house: House) -> Prefills:
        chat = house.surrogate.chat

        async def watched(call: ChatCall) -> Reply:
            if call.background and call.body["max_tokens"] == 1:
                self.prompts.append(list(call.body["messages"]))
                await self.go.wait()
                if self.failure is not None:
                    raise self.failure
            answer: Reply = await chat(call)
            return answer

        house.surrogate.chat = watched
        return self


async def test_a_user_who_is_quicker_than_the_prefill_is_answered_by_the_surrogate(build: Build) -> None:
    house = await started(build)
    prefills = Prefills().at(house)
    history = await talked(house, 4)
    await until(lambda: bool(prefills.prompts))
    assert (await house.say(history, "question 5")).headers["X-SOMA-Engine"] == "surrogate"
    assert not prefills.go.is_set()
    prefills.go.set()
    await house.settled()


async def test_a_cache_that_could_not_be_warmed_does_not_undo_the_switch(build: Build) -> None:
    house = await started(build)
    prefills = Prefills(failure=EngineUnavailable("busy")).at(house)
    prefills.go.set()
    await talked(house, 4)
    await house.settled()
    assert prefills.prompts
    assert house.session().phase is Phase.SWITCHED
    assert "training_failed" not in house.kinds()


@pytest.mark.parametrize("text", ["session", "until_adapted", "never"])
async def test_the_cache_is_warmed_with_what_was_said_however_long_that_is_kept(
    build: Build, text: str
) -> None:
    house = await started(build, retention={"text": text})
    prefills = Prefills().at(house)
    prefills.go.set()
    history = await talked(house, 4)
    await house.settled()
    (prompt,) = prefills.prompts
    assert prompt[:-1] == history


@pytest.mark.parametrize(("text", "kept"), [("session", 4), ("until_adapted", 0), ("never", 0)])
async def test_no_rehearsal_outlives_the_words_it_answers(build: Build, text: str, kept: int) -> None:
    house = await started(build, adaptation={"candidates": ["plain"]}, retention={"text": text})
    house.surrogate.answers = ["different"]
    await talked(house, 4)
    await house.settled()
    assert house.session().phase is Phase.ORIGINAL_ONLY
    assert sum(len(mine) for mine in house.rehearsals._of.values()) == kept


async def test_a_sweep_forgets_rehearsals_as_old_as_the_words_it_erases(build: Build) -> None:
    house = await started(build, retention={"text_ttl_s": 0.01})
    await talked(house, 3)
    assert house.rehearsals._of
    await asyncio.sleep(0.02)
    await house.custody.sweep()
    assert not house.rehearsals._of
