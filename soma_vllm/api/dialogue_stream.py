"""A stream of events as a response: kept open while nothing comes, and closed however it ends.

Guarantees: the events are closed when the response ends, also when the client left before it began; after so
many seconds of silence a comment is sent, between events and never inside one; an answer that is long in coming
is begun without waiting for it, and an error that comes then is an event of the stream, followed by its end.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Self

from fastapi.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from soma_vllm.api.error_responses import failed
from soma_vllm.engines.engine import Events
from soma_vllm.engines.sse import DONE, serialize
from soma_vllm.errors import EngineError, SomaError
from soma_vllm.scheduler.dispatcher import Answer

logger = logging.getLogger(__name__)

COMMENT = b": keep-alive\n\n"

ROUTED_POLL_S = 0.1

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
"""So that no cache keeps a stream and no proxy gathers it."""

OnError = Callable[[SomaError], list[str]]
"""The events by which a stream says that there is no answer."""


class DialogueStream(StreamingResponse):
    """The response. `silence_s` 0: no comments."""

    def __init__(self, events: Events, headers: Mapping[str, str], silence_s: float = 0.0) -> None:
        super().__init__(
            _WithError(events), headers={**STREAM_HEADERS, **headers}, media_type="text/event-stream"
        )
        self._events = events
        self._silence_s = silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then close them."""
        keeping = None
        try:
            if self._silence_s:
                kept = KeptOpen(send, self._silence_s)
                send, keeping = kept.send, asyncio.create_task(kept.watch(), name="soma-keep-alive")
            await super().__call__(scope, receive, send)
        finally:
            if keeping is not None:
                keeping.cancel()
            await self._events.aclose()


class _WithError:
    """Events that end with an error in OpenAI's shape, and without their end mark, where the engine's break."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._broken = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if self._broken:
            raise StopAsyncIteration
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            raise
        except Exception as error:  # the status was sent, so that nothing else could tell the client
            self._broken = True
            # Of others the type alone: a message may quote what was said.
            told = error if isinstance(error, SomaError) else EngineError(type(error).__name__)
            logger.warning("a stream broke off: %s", told)
            return serialize(bytes(failed(told).body).decode())


class KeptOpen:
    """Sends what it is given, and comments where that is silent for long."""

    def __init__(self, send: Send, silence_s: float) -> None:
        self._send = send
        self._silence_s = silence_s
        self._sending = asyncio.Lock()
        self._open = False
        self._last = time.monotonic()

    async def send(self, message: Message) -> None:
        """Pass a piece on."""
        async with self._sending:
            self._open = message["type"] == "http.response.start" or bool(message.get("more_body"))
            await self._send(message)
            self._last = time.monotonic()

    async def watch(self) -> None:
        """Send comments until it is cancelled or the client has left."""
        while True:
            await asyncio.sleep(max(0.001, self._last + self._silence_s - time.monotonic()))
            async with self._sending:
                if not self._open or time.monotonic() - self._last < self._silence_s:
                    continue
                try:
                    await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                except OSError:
                    return  # the next event finds out, too
                self._last = time.monotonic()


class Awaited:
    """The `Events` of an answer that is still being made."""

    def __init__(self, opening: asyncio.Task[Answer], on_error: OnError) -> None:
        self._opening = opening
        self._on_error = on_error
        self._events: Events | None = None
        self._last: list[str] | None = None
        """What is left to say, where there is no answer."""
        self._begun = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if not self._begun:
            self._begun = True
            return COMMENT.decode()
        if self._events is None and self._last is None:
            try:
                self._events = (await asyncio.shield(self._opening)).events
            except SomaError as error:
                self._last = self._on_error(error)
        if self._last is not None:
            if not self._last:
                raise StopAsyncIteration
            return self._last.pop(0)
        assert self._events is not None
        return await anext(self._events)

    async def aclose(self) -> None:
        """Stop the answer, also while it is being made."""
        if self._events is None:
            self._opening.cancel()
            try:
                self._events = (await self._opening).events
            except (asyncio.CancelledError, SomaError):
                return
        await self._events.aclose()


async def respond_streaming(
    opening: Awaitable[Answer], routed: Mapping[str, str], silence_s: float, on_error: OnError
) -> Response:
    """The response to a request for a stream.

    It waits for the answer to begin, but once the request is routed no longer than `silence_s`: then it has the
    headers in `routed`.

    Raises:
        SomaError: there is no answer, and that was known in time.
    """
    task = asyncio.ensure_future(opening)
    try:
        await asyncio.wait([task], timeout=silence_s or None)
        while not (task.done() or routed):  # headers come first: they say which session it is
            await asyncio.wait([task], timeout=ROUTED_POLL_S)
    except BaseException:  # the client left
        await Awaited(task, on_error).aclose()
        raise
    if task.done():
        answer = task.result()
        return DialogueStream(answer.events, answer.headers, silence_s)
    return DialogueStream(Awaited(task, on_error), dict(routed), silence_s)


def chat_errors(error: SomaError) -> list[str]:
    """How a chat stream says that there is no answer."""
    body: Any = json.loads(bytes(failed(error).body))
    return [serialize(json.dumps(body)), serialize(DONE)]
