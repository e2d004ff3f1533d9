"""Listening to a reply without touching it: what was said, how much of it, how fast, and whether it ended well.

Events are kept as text while they stream and are read only afterwards, so a token costs the client nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from soma_vllm.engines.engine import Events
from soma_vllm.types import Usage


@dataclass(frozen=True)
class Choice:
    """One of a reply's answers."""

    text: str = ""
    calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of tools, as OpenAI's `tool_calls`."""


@dataclass(frozen=True)
class ParsedReply:
    """What a reply said, once it is over."""

    choices: tuple[Choice, ...]
    """In the order of their indices; at least one."""
    usage: Usage
    complete: bool
    """The engine finished by itself: not cut off by the client or a failure."""
    ttft_s: float | None
    latency_s: float

    @property
    def text(self) -> str:
        """Content of choice 0."""
        return self.choices[0].text

    @property
    def silent(self) -> bool:
        """Nothing was said."""
        return not any(choice.text or choice.calls for choice in self.choices)


Ended = Callable[[ParsedReply], Awaitable[None]]


def heard_whole(body: Mapping[str, Any], started: float) -> ParsedReply:
    """What a reply that came in one piece said."""
    found = sorted(body.get("choices") or (), key=_index)
    choices = tuple(_choice(choice.get("message") or {}) for choice in found) or (Choice(),)
    return ParsedReply(choices, _usage(body.get("usage")), True, None, time.monotonic() - started)


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
        choices, usage, complete = read_events(self._kept)
        await self._ended(ParsedReply(choices, usage, complete, self._first, latency))


def read_events(events: Iterable[str]) -> tuple[tuple[Choice, ...], Usage, bool]:
    """(choices, usage, whether the stream came to its own end) of server-sent events."""
    spoken: dict[int, ChoiceBuilder] = {0: ChoiceBuilder()}
    usage = Usage()
    complete = failed = False
    for event in events:
        data = event.removeprefix("data:").strip()
        if data == "[DONE]":
            complete = True
        elif data.startswith("{"):
            chunk = json.loads(data)
            failed = failed or "error" in chunk
            usage = _usage(chunk["usage"]) if chunk.get("usage") else usage
            for choice in chunk.get("choices") or ():
                spoken.setdefault(_index(choice), ChoiceBuilder()).hear(choice.get("delta") or {})
    return tuple(spoken[index].choice() for index in sorted(spoken)), usage, complete and not failed


class ChoiceBuilder:
    """One choice of a stream, put together."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}

    def hear(self, delta: Mapping[str, Any]) -> None:
        """Add what one event brought."""
        self._pieces.append(delta.get("content") or "")
        for part in delta.get("tool_calls") or ():
            call = self._calls.setdefault(_index(part), {"id": None, "type": "function", "function": {}})
            call["id"] = part.get("id") or call["id"]
            function, new = call["function"], part.get("function") or {}
            function["name"] = new.get("name") or function.get("name")
            function["arguments"] = function.get("arguments", "") + (new.get("arguments") or "")

    def choice(self) -> Choice:
        """All of it."""
        return Choice("".join(self._pieces), tuple(self._calls[index] for index in sorted(self._calls)))


def _choice(message: Mapping[str, Any]) -> Choice:
    return Choice(message.get("content") or "", tuple(message.get("tool_calls") or ()))


def _index(part: Mapping[str, Any]) -> int:
    return part.get("index") or 0


def _usage(found: Mapping[str, Any] | None) -> Usage:
    if not found:
        return Usage()
    details = found.get("prompt_tokens_details") or {}
    return Usage(found.get("prompt_tokens"), details.get("cached_tokens"), found.get("completion_tokens"))
