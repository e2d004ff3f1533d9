"""What every `Engine` keeps, a fake or a real one: the cases, written once.

A test module derives a class from `EngineContract` and gives it a fixture `subject`.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, Protocol

import pytest

from soma_vllm.engines.engine import ChatCall, Engine, Events, Reply
from soma_vllm.errors import EngineRefused
from support.guard import GUARD_S

QUERY = {"messages": [{"role": "user", "content": "tell me something"}], "temperature": 0.0}
SHORT = {**QUERY, "max_tokens": 8}
LONG = {**QUERY, "temperature": 1.0, "max_tokens": 1500, "ignore_eos": True, "n": 8}
"""Lasts for seconds even on a tiny model. Not greedy: vLLM then refuses several choices."""
WRONG = {**QUERY, "temperature": -1.0}
"""vLLM refuses it."""


class Subject(Protocol):
    """An engine, and what a test has to know of it or have it do."""

    engine: Engine

    def refuse_the_next_call(self) -> None:
        """Make `WRONG` refused; a real engine refuses it by itself."""

    def hold_the_next_call(self) -> None:
        """Have the next call last until it is cancelled; on a real engine `LONG` lasts long enough."""

    async def until_called(self) -> None:
        """Return once the engine is at work on a call."""

    async def require_stopped(self) -> None:
        """Return once the engine stopped before the end of `LONG`; fails if it never does."""


async def started(subject: Subject, body: dict[str, Any]) -> Events:
    """The events of a streamed reply."""
    reply = await subject.engine.chat(ChatCall({**body, "stream": True}))
    assert reply.body is None
    assert reply.events is not None
    return reply.events


async def chunks_of(events: Events) -> list[dict[str, Any]]:
    """Every chunk of a stream up to its `[DONE]`, which ends it."""
    *told, last = [event async for event in events]
    assert last == "data: [DONE]\n\n", last
    assert all(event.startswith("data: ") and event.endswith("\n\n") for event in told), told
    return [json.loads(event.removeprefix("data: ")) for event in told]


async def whole(subject: Subject, body: dict[str, Any]) -> dict[str, Any]:
    reply: Reply = await subject.engine.chat(ChatCall(body))
    assert reply.events is None
    assert reply.body is not None
    return dict(reply.body)


def require_usage(usage: dict[str, Any]) -> None:
    assert usage["prompt_tokens"] >= 1, usage
    assert usage["completion_tokens"] >= 1, usage
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], usage


class EngineContract:
    """The cases."""

    async def test_a_whole_answer_is_one_chat_completion_with_its_usage(self, subject: Subject) -> None:
        body = await whole(subject, SHORT)
        assert (body["object"], body["model"]) == ("chat.completion", subject.engine.name)
        (choice,) = body["choices"]
        assert (choice["index"], choice["message"]["role"]) == (0, "assistant")
        assert isinstance(choice["message"]["content"], str)
        assert choice["finish_reason"] in ("stop", "length")
        require_usage(body["usage"])

    async def test_a_streamed_answer_is_chunks_that_end_with_done(self, subject: Subject) -> None:
        chunks = await chunks_of(await started(subject, SHORT))
        assert {(chunk["object"], chunk["model"]) for chunk in chunks} == {
            ("chat.completion.chunk", subject.engine.name)
        }
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        assert choices[0]["delta"]["role"] == "assistant"
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert choices[-1]["finish_reason"] in ("stop", "length")
        assert not any(chunk.get("usage") for chunk in chunks)  # it was not asked for

    async def test_a_stream_that_is_asked_for_its_usage_tells_it_last_and_without_choices(
        self, subject: Subject
    ) -> None:
        *chunks, last = await chunks_of(
            await started(subject, {**SHORT, "stream_options": {"include_usage": True}})
        )
        assert last["choices"] == []
        require_usage(last["usage"])
        assert all(chunk["choices"] for chunk in chunks)

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    async def test_several_choices_have_an_index_and_an_end_each(self, subject: Subject, stream: bool) -> None:
        asked = {**SHORT, "temperature": 1.0, "n": 3}
        if stream:
            chunks = await chunks_of(await started(subject, asked))
            choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        else:
            choices = (await whole(subject, asked))["choices"]
        assert sorted(choice["index"] for choice in choices) == [0, 1, 2]
        assert all(choice["finish_reason"] in ("stop", "length") for choice in choices)

    @pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
    async def test_a_wrong_request_is_refused_before_anything_is_told(
        self, subject: Subject, stream: bool
    ) -> None:
        subject.refuse_the_next_call()
        with pytest.raises(EngineRefused) as caught:
            await subject.engine.chat(ChatCall({**WRONG, "stream": stream}))
        assert caught.value.status == 400
        assert caught.value.body["error"]["message"]

    async def test_closing_a_stream_stops_the_generation(self, subject: Subject) -> None:
        events = await started(subject, LONG)
        assert (await anext(aiter(events))).startswith("data: ")
        await events.aclose()
        await subject.require_stopped()
        await events.aclose()  # harmless when it is over

    async def test_closing_a_stream_unread_stops_the_generation(self, subject: Subject) -> None:
        await (await started(subject, LONG)).aclose()
        await subject.require_stopped()

    async def test_cancelling_a_whole_answer_stops_the_generation(self, subject: Subject) -> None:
        subject.hold_the_next_call()
        call = asyncio.create_task(subject.engine.chat(ChatCall(LONG)))
        async with asyncio.timeout(GUARD_S):
            await subject.until_called()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await subject.require_stopped()

    async def test_calls_at_the_same_time_are_all_answered(self, subject: Subject) -> None:
        bodies = await asyncio.gather(*(whole(subject, SHORT) for _ in range(3)))
        assert [len(body["choices"]) for body in bodies] == [1, 1, 1]
