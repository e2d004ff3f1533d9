"""Reading the HTTP answers of an OpenAI-compatible endpoint, streamed or whole, to their end.

Guarantees: a failed connection is an `EngineUnavailable`; an answer that comes whole is bounded in bytes, one
event of a stream in characters; where a stream was asked for there is one, also of an endpoint that answers
with a whole completion.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import aiohttp

from soma_vllm.engines.dialect import DONE_EVENT, completion_of, event_of, events_of
from soma_vllm.engines.sse import DONE, ServerSentEvent, SSEParser, serialize
from soma_vllm.errors import ConnectionLost, EngineUnavailable

MOST_BYTES = 64 * 1024**2
"""Of an answer that comes in one piece."""

_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)
_BLANK = b"\xef\xbb\xbf \t\r\n"
"""Around JSON: a byte order mark, and what keeps a connection alive."""

_FINISHED = re.compile(r'"finish_reason"\s*:\s*"[^"]')
"""In an event of a choice that ended. Inside a JSON string its quotes would be escaped."""


@contextlib.contextmanager
def failures_as_unavailable(kind: type[EngineUnavailable] = EngineUnavailable) -> Iterator[None]:
    """Raises EngineUnavailable where the connection fails; of `kind` unless it was waited for too long."""
    try:
        yield
    except _BROKEN as error:
        # The class alone: a message of aiohttp may quote what was sent.
        why = type(error).__name__
        found = EngineUnavailable if isinstance(error, TimeoutError) else kind
        raise found(f"the original cannot be reached or broke off: {why}") from error


async def head_of(posted: Any) -> aiohttp.ClientResponse:
    """The response to a request, once its head has arrived.

    Raises:
        ConnectionLost: the connection failed before.
        EngineUnavailable: there was none in time.
    """
    with failures_as_unavailable(ConnectionLost):
        response: aiohttp.ClientResponse = await posted
        return response


async def whole(content: aiohttp.StreamReader) -> bytes:
    """An answer that comes in one piece, without what may stand around JSON.

    Raises:
        EngineUnavailable: the connection fails, or it is too long.
    """
    pieces, size = [], 0
    with failures_as_unavailable():
        while piece := await content.readany():
            pieces.append(piece)
            size += len(piece)
            if size > MOST_BYTES:
                raise EngineUnavailable(f"the original answered more than {MOST_BYTES} bytes")
    return b"".join(pieces).strip(_BLANK)


def passed_on(event: ServerSentEvent) -> str | None:
    """As `event_of` for a vLLM, whose events need no reading but where they may report an error."""
    return event_of(event) if '"error"' in event.data or "\n" in event.data else serialize(event.data)


async def events_in(
    content: aiohttp.StreamReader, shaped: Callable[[ServerSentEvent], str | None], choices: int
) -> AsyncGenerator[str, None]:
    """The events of a reply, each in OpenAI's shape as it comes, the last `data: [DONE]`.

    A reply whose choices have all told their `finish_reason` is whole, however the connection ends then.

    Raises:
        EngineRefused, EngineUnavailable: it reports an error; the connection fails or ends before.
    """
    parser, finished, begun = SSEParser(), 0, False
    while True:
        try:
            with failures_as_unavailable():
                piece = await content.readany()
        except EngineUnavailable:
            if finished < choices:
                raise
            piece = b""
        if not begun and (head := piece.lstrip(_BLANK)):
            begun = True
            if head.startswith((b"{", b"[")):
                for text in _stream_of(head + await whole(content)):
                    yield text
                return
        for event in parser.feed(piece or b"\n\n"):  # at the end, what only lacks its blank line
            if event.data.strip() == DONE:
                yield DONE_EVENT
                return
            if (passed := shaped(event)) is not None:
                finished += len(_FINISHED.findall(passed))
                yield passed
        if not piece:
            break
    if finished < choices:
        raise EngineUnavailable("the original's stream ended without a finish_reason and without data: [DONE]")
    yield DONE_EVENT


def _stream_of(raw: bytes) -> Iterator[str]:
    """The stream of a completion that came whole."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        raise EngineUnavailable("the original answered neither a stream nor JSON") from None
    return events_of(completion_of(found))
