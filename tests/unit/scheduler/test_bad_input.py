"""Turns and trainings that go wrong: one clear event on the session, and the original keeps answering."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from scheduler_house import Build, House  # type: ignore[import-not-found]

from soma_vllm.errors import EngineRefused, TrainingError
from soma_vllm.session.phases import Phase
from soma_vllm.types import AdapterRef, Agreement, Event, SessionKey

History = list[dict[str, Any]]


def events(house: House, kind: str) -> list[dict[str, Any]]:
    return [dict(event.data) for _, event in house.events if event.kind == kind]


async def served_by(house: House, history: History) -> str:
    answer = await house.say(history, "one more question")
    return str(answer.headers["X-SOMA-Engine"])


async def in_training(house: House) -> History:
    """A session whose training has begun and does not end before it is told to."""
    house.surrogate.answers = ["different", "same"]
    house.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}")
    while not house.trainer.requests:
        await asyncio.sleep(0)
    return history


@pytest.mark.parametrize("answer", ["", " \n "])
async def test_an_empty_answer_is_not_learned_from_and_says_so(house: House, answer: str) -> None:
    house.original.answers = [answer, "same"]
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}")
    await house.settled()
    assert events(house, "turn_skipped") == [{"turn": 1, "why": "its answer is empty"}]
    assert house.session().phase is Phase.WARM_START
    await house.say(history, "question 3")
    await house.settled()
    assert house.session().phase is Phase.SWITCHED


async def test_an_answer_that_was_cut_off_is_not_learned_from_and_says_so(house: House) -> None:
    answer = await house.say([], "question 1", stream=True)
    assert answer.reply.events is not None
    for _ in range(2):
        await anext(answer.reply.events)
    await answer.reply.events.aclose()
    assert events(house, "turn_skipped") == [{"turn": 1, "why": "its answer was cut off"}]


async def test_turns_of_one_word_are_learned_from(house: House) -> None:
    house.original.answers = ["1"]
    house.surrogate.answers = ["different", "1"]
    history: History = []
    for query in ("a", "b"):
        await house.say(history, query)
    await house.settled()
    assert house.session().phase is Phase.SWITCHED
    assert house.session().adapter is not None


async def test_a_warm_turn_too_long_for_the_surrogate_is_named_with_its_lengths(house: House) -> None:
    house.surrogate.refusal = EngineRefused(400, {"error": {"message": "longer than the context"}})
    history: History = []
    for query in ("a" * 10, "b" * 20):
        await house.say(history, query)
    await house.settled()
    (refused,) = events(house, "refused")
    for part in ("turn 1", "10 characters", "200 tokens", "context of 4096 tokens"):
        assert part in refused["reason"]
    assert house.session().phase is Phase.ORIGINAL_ONLY
    assert await served_by(house, history) == "original"


@pytest.mark.parametrize("which", ["plain", "adapted"])
async def test_a_score_that_is_not_a_number_serves_nobody(house: House, which: str) -> None:
    house.surrogate.answers = ["different", "same"]
    setattr(house.trainer, which, Agreement(math.nan, 0.5, 10))
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}")
    await house.settled()
    (failed,) = events(house, "training_failed")
    assert failed["error"] == "TrainingError"
    assert "nan" in failed["message"]
    assert house.shelf.published == []
    assert await served_by(house, history) == "original"


async def test_a_loss_that_is_not_a_number_is_told_as_the_trainer_tells_it(house: House) -> None:
    house.surrogate.answers = ["different"]
    house.trainer.failure = TrainingError("the loss was nan at step 3; expected a number")
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}")
    await house.settled()
    (failed,) = events(house, "training_failed")
    assert failed == {"error": "TrainingError", "message": "the loss was nan at step 3; expected a number"}
    assert await served_by(house, history) == "original"


async def closed(house: House, history: History) -> None:
    house.book.note(house.session().key, "closed")


async def restarted(house: House, history: History) -> None:
    house.book.note(house.session().key, "restarted")


@pytest.mark.parametrize("end", [closed, restarted])
async def test_a_session_that_ends_during_its_training_gets_no_adapter(house: House, end: Any) -> None:
    history = await in_training(house)
    await end(house, history)
    house.trainer.go.set()
    await house.settled()
    (abandoned,) = events(house, "adaptation_abandoned")
    assert abandoned["phase"] == house.session().phase
    assert house.shelf.published == []
    assert house.surrogate.log == []
    assert house.session().adapter is None
    assert not Path(house.trainer.requests[0].out_dir).exists()
    assert "judged" not in house.kinds()


async def test_a_training_that_fails_after_its_session_has_ended_fails_nothing(house: House) -> None:
    history = await in_training(house)
    await closed(house, history)
    house.trainer.failure = TrainingError("the loss was not a number")
    house.trainer.go.set()
    await house.settled()
    assert "training_failed" not in house.kinds()
    assert house.kinds().count("adaptation_abandoned") == 1


@pytest.mark.parametrize("moment", ["adapter_published", "adapter_loaded", "judged"])
async def test_an_adapter_published_before_its_session_ended_is_deleted(build: Build, moment: str) -> None:
    house = build()
    reached = asyncio.Event()

    def stop_there(_: SessionKey, event: Event) -> None:
        if event.kind == moment:
            house.surrogate.go.clear()
            reached.set()

    load = house.surrogate.load

    async def load_when_told(ref: AdapterRef) -> None:
        await house.surrogate.go.wait()
        await load(ref)

    encode = house.encoder.encode

    async def encode_when_told(texts: Sequence[str]) -> Any:
        if "judged" in house.kinds():
            await house.surrogate.go.wait()
        return await encode(texts)

    house.surrogate.load = load_when_told
    house.encoder.encode = encode_when_told
    house.book._observers = (*house.book._observers, stop_there)
    await house.book.start()
    house.surrogate.answers = ["different", "same"]
    history: History = []
    for number in (1, 2):
        await house.say(history, f"question {number}")
    await reached.wait()
    await closed(house, history)
    house.surrogate.go.set()
    await house.settled()
    assert house.surrogate.log == ["load adapter-s-1", "unload adapter-s-1", "delete adapter-s-1"]
    assert house.session().phase is Phase.CLOSED
    assert house.kinds().count("adaptation_abandoned") == 1
    assert "switched" not in house.kinds()
