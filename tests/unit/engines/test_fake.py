"""The fake engine's script; the contract that it keeps is tested in tests/contract."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.fake_engine import FakeEngine

from soma_vllm.engines.engine import ChatCall, Engine
from soma_vllm.errors import EngineRefused, EngineUnavailable

CALL = ChatCall(body={"messages": []})
STREAM = ChatCall(body={"messages": [], "stream": True})


async def test_answers_come_in_turn_and_calls_are_recorded() -> None:
    engine: Engine = FakeEngine(answers=["one", "two"])
    said = [(await engine.chat(CALL)).body for _ in range(3)]
    assert [body["choices"][0]["message"]["content"] for body in said if body] == ["one", "two", "two"]


async def test_a_stream_spells_the_answer_and_ends() -> None:
    engine = FakeEngine(answers=["one two  three"])
    reply = await engine.chat(STREAM)
    assert reply.events is not None
    *events, last = [event async for event in reply.events]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "one two  three"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert last == "data: [DONE]\n\n"
    assert not engine.closed_early.is_set()


async def test_a_held_call_waits_and_notices_that_it_was_cancelled() -> None:
    engine = FakeEngine()
    engine.go.clear()
    task = asyncio.create_task(engine.chat(CALL))
    await engine.called.wait()
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.closed_early.is_set()


async def test_a_refusal_and_a_break_happen_where_they_were_planned() -> None:
    engine = FakeEngine()
    engine.refusal = EngineRefused(429, {})
    with pytest.raises(EngineRefused):
        await engine.chat(STREAM)
    engine.refusal, engine.break_after = None, 1
    reply = await engine.chat(STREAM)
    assert reply.events is not None
    await anext(reply.events)
    with pytest.raises(EngineUnavailable, match="after 1 events"):
        await anext(reply.events)
