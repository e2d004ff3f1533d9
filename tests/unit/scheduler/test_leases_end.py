"""Whatever an engine streams, an observer throws or a client breaks off: what a turn holds is released once."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.guard import GUARD_S
from support.services import Build, Services

from soma_vllm.engines.engine import ChatCall, Reply
from soma_vllm.errors import EngineRefused, EngineUnavailable, SomaError
from soma_vllm.types import Usage

FRAGMENTS = [
    'data: {"choices":[{"index":0,"delta":{"content":"hello"}}]}\n\n',
    'data: {"choices":[{"index":0,"delta":{"content":[{"type":"text","text":"hello"}]}}]}\n\n',
    'data: {"choices":[null]}\n\n',
    'data: {"choices":{}}\n\n',
    'data: {"choices":[{"index":[],"delta":{"tool_calls":[{"function":{"arguments":{"a":1}}}]}}]}\n\n',
    'data: {"choices":[{"index":0,"delta":7,"logprobs":{"content":[{"token":3}]}}]}\n\n',
    'data: {"choices":[],"usage":{"prompt_tokens":"x","completion_tokens":[]}}\n\n',
    'data: {"error":{"message":"broke"}}\n\n',
    "data: {oops\n\n",
    "event: message\nid: 3\ndata: {}\n\n",
    ": alive\n\n",
    "data: \ud800\n\n",
    "",
    "data: [DONE]\n\n",
]


def play(engine: FakeEngine, events: list[str], failure: Exception | None) -> None:
    """Have an engine answer every stream with these events, then break as told."""

    async def stream() -> AsyncGenerator[str, None]:
        for event in events:
            await asyncio.sleep(0)
            yield event
        if failure is not None:
            raise failure

    async def chat(call: ChatCall) -> Reply:
        engine.calls.append(call)
        return Reply(events=stream())

    engine.chat = chat  # type: ignore[method-assign]


async def switched(services: Services) -> list[dict[str, Any]]:
    """The history of a session that an adapter serves."""
    services.surrogate.answers = ["different", "same"]
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    assert services.session().adapter is not None
    return history


@pytest.mark.parametrize("seed", range(40))
async def test_whatever_is_streamed_thrown_or_left_nothing_is_held_afterwards(build: Build, seed: int) -> None:
    services = build()
    await services.registry.start()
    history = await switched(services)
    chance = random.Random(seed)
    failures = [None, EngineUnavailable("broke"), RuntimeError("a bug"), ValueError("no JSON")]
    for engine in (services.surrogate, services.original):
        events = chance.choices(FRAGMENTS, k=chance.randint(0, 6))
        play(engine, events, chance.choice(failures))

    def thrown(*args: Any) -> None:
        if chance.random() < 0.4:
            raise chance.choice([RuntimeError("an observer broke"), KeyError("x"), EngineRefused(400, {})])

    services.registry.bus.subscribe(thrown)  # type: ignore[arg-type]
    services.meter.spent = thrown  # type: ignore[method-assign]
    for number in range(6):
        async with asyncio.timeout(GUARD_S):
            asked = asyncio.create_task(
                services.say(list(history), f"more {number}", chance.choice(["s", None]), stream=True)
            )
            if chance.random() < 0.3:
                await asyncio.sleep(0)
                asked.cancel()
            (answer,) = await asyncio.gather(asked, return_exceptions=True)
            if isinstance(answer, BaseException):
                assert isinstance(answer, SomaError | asyncio.CancelledError | RuntimeError | ValueError)
                continue
            stream = answer.reply.events
            assert stream is not None
            reading = asyncio.create_task(_read(stream, chance.randint(0, 8)))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
                reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await stream.aclose()
    await services.settled()
    assert {key: entry.holds for key, entry in services.registry._entries.items() if entry.holds} == {}
    assert services.leases.count() == 0
    assert services.meter.reservations == []


async def _read(stream: Any, most: int) -> None:
    for _ in range(most):
        await anext(stream)


async def test_an_observer_that_fails_keeps_the_event_from_no_other(services: Services) -> None:
    heard: list[str] = []

    def fails(key: object, event: object) -> None:
        raise RuntimeError("no")

    services.registry.bus.subscribe(fails)
    services.registry.bus.subscribe(lambda key, event: heard.append(event.kind))
    answer = await services.say([], "question")
    assert answer.reply.body is not None
    assert heard == ["turn"]


async def test_an_answer_that_cannot_be_recorded_is_still_the_clients(services: Services) -> None:
    def fails(tenant: str, usage: Usage) -> None:
        raise RuntimeError("no")

    services.meter.spent = fails  # type: ignore[method-assign]
    assert (await services.say([], "question")).reply.body is not None
    stream = (await services.say([], "question", "t", stream=True)).reply.events
    assert stream is not None
    assert [event async for event in stream][-1] == "data: [DONE]\n\n"
    assert services.registry._entries.keys() == set() or all(
        entry.holds == 0 for entry in services.registry._entries.values()
    )


async def test_the_counts_of_a_stream_are_taken_off_unless_the_client_asked(services: Services) -> None:
    async def told(**more: Any) -> list[str]:
        stream = (await services.say([], "one two", "s", stream=True, **more)).reply.events
        assert stream is not None
        return [event async for event in stream]

    assert not any('"usage"' in event for event in await told())
    (_, usage), *_ = services.meter.spendings
    assert None not in (usage.prompt_tokens, usage.completion_tokens)
    assert services.original.calls[0].body["stream_options"] == {"include_usage": True}
    assert any('"usage"' in event for event in await told(stream_options={"include_usage": True}))


async def test_a_stream_that_the_client_leaves_costs_what_was_heard(services: Services) -> None:
    services.original.answers = ["one two three four five"]
    stream = (await services.say([], "a question of some length", "s", stream=True)).reply.events
    assert stream is not None
    for _ in range(4):
        await anext(stream)
    await stream.aclose()
    ((_, usage),) = services.meter.spendings
    assert usage.completion_tokens in (3, 4)
    assert (usage.prompt_tokens or 0) > 5


async def test_an_original_that_knows_no_counts_is_asked_without_them_from_then_on(services: Services) -> None:
    chat = services.original.chat

    async def picky(call: ChatCall) -> Reply:
        if "stream_options" in call.body:
            services.original.calls.append(call)
            raise EngineRefused(400, {"error": {"message": "stream_options: unknown"}})
        return await chat(call)

    services.original.chat = picky  # type: ignore[method-assign]
    for name in ("a", "b"):
        stream = (await services.say([], "question", name, stream=True)).reply.events
        assert stream is not None
        assert len([event async for event in stream]) > 1
    assert len(services.original.calls) == 3


@pytest.mark.parametrize("status", [429, 409])
async def test_a_busy_original_is_not_asked_twice(build: Build, status: int) -> None:
    services = build(original={"api": "vllm"})
    await services.registry.start()
    services.original.refusal = EngineRefused(status, {}, retry_after=7)
    for stream in (False, True):
        with pytest.raises(EngineRefused) as refused:
            await services.say([], "question", f"s{stream}", stream=stream)
        assert refused.value.retry_after == 7
    assert len(services.original.calls) == 2


async def test_an_original_that_fails_leaves_the_answer_to_the_surrogate_where_that_is_wanted(
    build: Build,
) -> None:
    services = build(original={"when_down": "surrogate", "breaker_failures": 2})
    await services.registry.start()
    services.original.refusal = EngineUnavailable("the original answered with status 500")
    for number in range(4):
        answer = await services.say([], "question", f"s{number}")
        assert answer.headers["X-SOMA-Engine"] == "surrogate"
    assert len(services.original.calls) == 2


async def test_a_database_that_hangs_costs_one_request_its_wait(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def hangs(*args: object) -> Any:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()

    monkeypatch.setattr("soma_vllm.sessions.ports.LOOKUP_S", 0.02)
    monkeypatch.setattr("soma_vllm.sessions.patient_store.LOOKUP_S", 0.02)
    monkeypatch.setattr(services.store, "events", hangs)
    for number in range(5):
        answer = await services.say([], "question", f"s{number}")
        assert answer.headers["X-SOMA-Reason"] == "session store unavailable"
    assert asked == 1


async def test_many_answers_to_one_question_record_the_question_once(services: Services) -> None:
    question = "x" * 10_000
    history: list[dict[str, Any]] = []
    answer = await services.say(history, question, n=64)
    recorded = [event for _, event in services.events if event.kind in ("turn", "variant")]
    assert len(recorded) == 64
    assert len(json.dumps([event.text for event in recorded])) < 2 * len(question)
    # A client may still go on from any of them.
    other = answer.reply.body["choices"][5]["message"]  # type: ignore[index]
    went_on = [history[0], dict(other)]
    await services.say(went_on, "next", n=1)
    branch = services.events[-1][0]
    first = services.registry.session(branch).turns[0]
    assert (first.answer, first.messages[0]["content"]) == (other["content"], question)


@pytest.mark.parametrize(
    "error", [EngineUnavailable("/srv/adapters\r\nX-Evil: 1"), EngineRefused(418, {"x": "/srv"})], ids=repr
)
async def test_a_reason_is_of_our_own_words(services: Services, error: Exception) -> None:
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    services.surrogate.refusal = error  # type: ignore[assignment]
    reason = (await services.say(history, "question 3")).headers["X-SOMA-Reason"]
    assert reason in ("surrogate failed: unavailable", "surrogate failed: refused with status 418")
