"""Listening to a reply without touching it: what was said, how much of it, how fast, and whether it ended well.

Events are kept as text while they stream and are read only afterwards, so a token costs the client nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from soma_vllm.engines.base import Events
from soma_vllm.types import Usage


@dataclass(frozen=True)
class Heard:
    """What a reply said, once it is over."""

    text: str
    """Content of choice 0."""
    usage: Usage
    complete: bool
    """The engine finished by itself: not cut off by the client or a failure."""
    ttft_s: float | None
    latency_s: float


Ended = Callable[[Heard], Awaitable[None]]


def heard_whole(body: Mapping[str, Any], started: float) -> Heard:
    """What a reply that came in one piece said."""
    choices = body.get("choices") or [{}]
    text = (choices[0].get("message") or {}).get("content") or ""
    return Heard(text, _usage(body.get("usage")), True, None, time.monotonic() - started)


class Listened:
    """The same stream of events; `ended` is awaited exactly once, when it is over, however that comes.

    A class and not an async generator, because closing a generator that nobody began to read runs none of it.
    """

    def __init__(self, events: Events, started: float, ended: Ended) -> None:
        self._events = events
        self._started = started
        self._ended = ended
        self._kept: list[str] = []
        self._first: float | None = None
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        try:
            event = await anext(self._events)
        except BaseException:
            await self.aclose()
            raise
        if self._first is None:
            self._first = time.monotonic() - self._started
        self._kept.append(event)
        return event

    async def aclose(self) -> None:
        """End the stream, wherever it is."""
        if self._over:
            return
        self._over = True
        latency = time.monotonic() - self._started
        await self._events.aclose()
        text, usage, complete = read_events(self._kept)
        await self._ended(Heard(text, usage, complete, self._first, latency))


def read_events(events: Iterable[str]) -> tuple[str, Usage, bool]:
    """(content of choice 0, usage, whether the stream came to its own end) of server-sent events."""
    pieces: list[str] = []
    usage = Usage()
    complete = False
    for event in events:
        data = event.removeprefix("data:").strip()
        if data == "[DONE]":
            complete = True
        elif data.startswith("{"):
            chunk = json.loads(data)
            usage = _usage(chunk["usage"]) if chunk.get("usage") else usage
            first: Mapping[str, Any] = next(
                (c for c in chunk.get("choices") or () if c.get("index", 0) == 0), {}
            )
            pieces.append((first.get("delta") or {}).get("content") or "")
    return "".join(pieces), usage, complete


def _usage(found: Mapping[str, Any] | None) -> Usage:
    if not found:
        return Usage()
    details = found.get("prompt_tokens_details") or {}
    return Usage(found.get("prompt_tokens"), details.get("cached_tokens"), found.get("completion_tokens"))
