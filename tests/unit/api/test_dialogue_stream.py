"""A stream is kept open while nothing comes, and begins although its answer is long in coming."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from support.guard import GUARD_S
from support.responses_services import ChatEvents

from soma_vllm.api.dialogue_stream import COMMENT, DialogueStream, chat_errors, respond_streaming
from soma_vllm.engines.engine import Reply
from soma_vllm.errors import BadRequest, EngineUnavailable, SomaError
from soma_vllm.scheduler.dispatcher import Answer

SILENCE_S = 0.05
HEADERS = {"X-SOMA-Engine": "original"}


class Stalling(ChatEvents):
    """Holds after its first event."""

    async def __anext__(self) -> str:
        event = await super().__anext__()
        if self.told == 1:
            self.go.clear()
        return event


class Wire:
    """What a client receives; it never leaves by itself."""

    def __init__(self) -> None:
        self.status: int | None = None
        self.headers: dict[str, str] = {}
        self.pieces: asyncio.Queue[bytes] = asyncio.Queue()
        self.leaves = asyncio.Event()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        elif message["body"]:
            self.pieces.put_nowait(message["body"])

    async def receive(self) -> Any:
        await self.leaves.wait()
        return {"type": "http.disconnect"}

    async def next(self) -> bytes:
        async with asyncio.timeout(GUARD_S):
            return await self.pieces.get()

    def serve(self, response: Any) -> asyncio.Task[None]:
        scope = {"type": "http", "asgi": {"spec_version": "2.3"}}
        return asyncio.create_task(response(scope, self.receive, self.send))


@pytest.fixture
def wire() -> Wire:
    return Wire()


async def test_silence_between_events_is_filled_with_comments(wire: Wire) -> None:
    events = Stalling(["data: 1\n\n", "data: 2\n\n"])
    served = wire.serve(DialogueStream(events, HEADERS, SILENCE_S))
    assert await wire.next() == b"data: 1\n\n"
    found = [await wire.next() for _ in range(3)]
    assert found[-1] == COMMENT
    events.go.set()
    await asyncio.wait_for(served, GUARD_S)
    rest = found + [wire.pieces.get_nowait() for _ in range(wire.pieces.qsize())]
    assert [piece for piece in rest if piece != COMMENT] == [b"data: 2\n\n"]
    assert events.closed.is_set()
    assert wire.headers["cache-control"] == "no-cache"
    assert wire.headers["x-accel-buffering"] == "no"
    assert wire.headers["x-soma-engine"] == "original"


async def test_without_a_limit_nothing_is_added(wire: Wire) -> None:
    events = ChatEvents(["data: 1\n\n"])
    await asyncio.wait_for(wire.serve(DialogueStream(events, HEADERS)), GUARD_S)
    assert wire.pieces.get_nowait() == b"data: 1\n\n"
    assert wire.pieces.empty()


async def test_an_answer_that_is_long_in_coming_is_begun_with_what_is_known_of_it(wire: Wire) -> None:
    go, events = asyncio.Event(), ChatEvents(["data: 1\n\n"])

    async def opening() -> Answer:
        await go.wait()
        return Answer(Reply(events=events), {"X-SOMA-Engine": "surrogate"})

    served = wire.serve(await respond_streaming(opening(), HEADERS, SILENCE_S, chat_errors))
    assert await wire.next() == COMMENT
    assert await wire.next() == COMMENT
    assert (wire.status, wire.headers["x-soma-engine"]) == (200, "original")
    go.set()
    await asyncio.wait_for(served, GUARD_S)
    assert b"data: 1\n\n" in [wire.pieces.get_nowait() for _ in range(wire.pieces.qsize())]
    assert events.closed.is_set()


async def test_an_error_in_time_has_its_status_and_a_late_one_is_an_event(wire: Wire) -> None:
    async def wrong(error: SomaError, after_s: float) -> Answer:
        await asyncio.sleep(after_s)
        raise error

    with pytest.raises(BadRequest):
        await respond_streaming(wrong(BadRequest("no"), 0), {}, SILENCE_S, chat_errors)
    late = wrong(EngineUnavailable("it broke"), 2 * SILENCE_S)
    await asyncio.wait_for(wire.serve(await respond_streaming(late, HEADERS, SILENCE_S, chat_errors)), GUARD_S)
    *_, told, done = [wire.pieces.get_nowait() for _ in range(wire.pieces.qsize())]
    assert json.loads(told.removeprefix(b"data: "))["error"]["message"] == "it broke"
    assert done == b"data: [DONE]\n\n"


async def test_a_client_that_leaves_while_it_waits_ends_the_work(wire: Wire) -> None:
    ended = asyncio.Event()

    async def opening() -> Answer:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    served = wire.serve(await respond_streaming(opening(), HEADERS, SILENCE_S, chat_errors))
    await wire.next()
    wire.leaves.set()
    await asyncio.wait_for(asyncio.gather(served, ended.wait()), GUARD_S)
