"""Turns and trainings that go wrong: one clear event on the session, and the original keeps answering."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.services import Build, Services

from soma_vllm.errors import EngineRefused, TrainingError
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import AdapterRef, Agreement, Event, SessionKey

History = list[dict[str, Any]]


def events(services: Services, kind: str) -> list[dict[str, Any]]:
    return [dict(event.data) for _, event in services.events if event.kind == kind]


async def served_by(services: Services, history: History) -> str:
    answer = await services.say(history, "one more question")
    return str(answer.headers["X-SOMA-Engine"])


async def in_training(services: Services) -> History:
    """A session whose training has begun and does not end before it is told to."""
    services.surrogate.answers = ["different", "same"]
    services.trainer.go.clear()
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    while not services.trainer.requests:
        await asyncio.sleep(0)
    return history


@pytest.mark.parametrize("answer", ["", " \n "])
async def test_an_empty_answer_is_not_learned_from_and_says_so(services: Services, answer: str) -> None:
    services.original.answers = [answer, "same"]
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    assert events(services, "turn_skipped") == [{"turn": 1, "why": "its answer is empty"}]
    assert services.session().phase is Phase.WARM_START
    await services.say(history, "question 3")
    await services.settled()
    assert services.session().phase is Phase.SWITCHED


async def test_an_answer_that_was_cut_off_is_not_learned_from_and_says_so(services: Services) -> None:
    answer = await services.say([], "question 1", stream=True)
    assert answer.reply.events is not None
    for _ in range(2):
        await anext(answer.reply.events)
    await answer.reply.events.aclose()
    assert events(services, "turn_skipped") == [{"turn": 1, "why": "its answer was cut off"}]


async def test_turns_of_one_word_are_learned_from(services: Services) -> None:
    services.original.answers = ["1"]
    services.surrogate.answers = ["different", "1"]
    history: History = []
    for query in ("a", "b"):
        await services.say(history, query)
    await services.settled()
    assert services.session().phase is Phase.SWITCHED
    assert services.session().adapter is not None


async def test_a_warm_turn_that_the_surrogate_refuses_is_named_with_the_cause(services: Services) -> None:
    services.surrogate.refusal = EngineRefused(
        400, {"error": {"message": "secret"}}, cause="chat_template_refused"
    )
    history: History = []
    for query in ("a" * 10, "b" * 20):
        await services.say(history, query)
    await services.settled()
    (refused,) = events(services, "refused")
    assert "turn 2: the surrogate cannot read it: chat_template_refused" in refused["reason"]
    assert "secret" not in str(services.events)
    assert services.session().phase is Phase.ORIGINAL_ONLY
    assert await served_by(services, history) == "original"


@pytest.mark.parametrize("which", ["plain", "adapted"])
async def test_a_score_that_is_not_a_number_serves_nobody(services: Services, which: str) -> None:
    services.surrogate.answers = ["different", "same"]
    setattr(services.trainer, which, Agreement(math.nan, 0.5, 10))
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    (failed,) = events(services, "training_failed")
    assert failed["error"] == "TrainingError"
    assert "nan" in failed["message"]
    assert services.adapter_store.published == []
    assert await served_by(services, history) == "original"


async def test_a_loss_that_is_not_a_number_is_told_as_the_trainer_tells_it(services: Services) -> None:
    services.surrogate.answers = ["different"]
    services.trainer.failure = TrainingError("the loss was nan at step 3; expected a number")
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    (failed,) = events(services, "training_failed")
    assert failed == {"error": "TrainingError", "message": "the loss was nan at step 3; expected a number"}
    assert await served_by(services, history) == "original"


async def closed(services: Services, history: History) -> None:
    services.registry.note(services.session().key, "closed")


async def restarted(services: Services, history: History) -> None:
    services.registry.note(services.session().key, "restarted")


@pytest.mark.parametrize("end", [closed, restarted])
async def test_a_session_that_ends_during_its_training_gets_no_adapter(services: Services, end: Any) -> None:
    history = await in_training(services)
    await end(services, history)
    services.trainer.go.set()
    await services.settled()
    (abandoned,) = events(services, "adaptation_abandoned")
    assert abandoned["phase"] == services.session().phase
    assert services.adapter_store.published == []
    assert services.surrogate.log == []
    assert services.session().adapter is None
    assert not Path(services.trainer.requests[0].out_dir).exists()
    assert "judged" not in services.kinds()


async def test_a_training_that_fails_after_its_session_has_ended_fails_nothing(services: Services) -> None:
    history = await in_training(services)
    await closed(services, history)
    services.trainer.failure = TrainingError("the loss was not a number")
    services.trainer.go.set()
    await services.settled()
    assert "training_failed" not in services.kinds()
    assert services.kinds().count("adaptation_abandoned") == 1


@pytest.mark.parametrize("moment", ["adapter_published", "adapter_loaded", "judged"])
async def test_an_adapter_published_before_its_session_ended_is_deleted(build: Build, moment: str) -> None:
    services = build()
    reached = asyncio.Event()

    def stop_there(_: SessionKey, event: Event) -> None:
        if event.kind == moment:
            services.surrogate.go.clear()
            reached.set()

    load = services.surrogate.load

    async def load_when_told(ref: AdapterRef) -> None:
        await services.surrogate.go.wait()
        await load(ref)

    encode = services.encoder.encode

    async def encode_when_told(texts: Sequence[str]) -> Any:
        if "judged" in services.kinds():
            await services.surrogate.go.wait()
        return await encode(texts)

    services.surrogate.load = load_when_told
    services.encoder.encode = encode_when_told
    services.registry.bus.subscribe(stop_there)
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    history: History = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await reached.wait()
    await closed(services, history)
    services.surrogate.go.set()
    await services.settled()
    assert services.surrogate.log == ["load adapter-s-1", "unload adapter-s-1", "delete adapter-s-1"]
    assert services.session().phase is Phase.CLOSED
    assert services.kinds().count("adaptation_abandoned") == 1
    assert "switched" not in services.kinds()
