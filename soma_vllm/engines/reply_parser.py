"""Observes a reply without changing it: what it said, its tokens, its times, and whether it ended by itself.

Events are kept as text while they stream and parsed only afterwards, so a token costs the client nothing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from soma_vllm.engines.engine import Events, Reply
from soma_vllm.engines.sse import DONE, SSEParser
from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.types import Usage

logger = logging.getLogger(__name__)


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


OnReply = Callable[[ParsedReply], Awaitable[None]]
"""Awaited with a reply once it is over."""


async def observe(reply: Reply, started: float, on_end: OnReply) -> Reply:
    """The same reply; `on_end` is awaited once, with what it said, when it is over.

    `started` is the request's arrival, `time.monotonic`.
    """
    if reply.events is not None:
        return replace(reply, events=observe_stream(reply.events, started, on_end))
    assert reply.body is not None
    await on_end(parse_body(reply.body, started))
    return reply


def parse_body(body: Mapping[str, Any], started: float) -> ParsedReply:
    """What a reply that came in one piece said."""
    found = sorted(body.get("choices") or (), key=_index)
    choices = tuple(_choice(choice.get("message") or {}) for choice in found) or (Choice(),)
    return ParsedReply(choices, _usage(body.get("usage")), True, None, time.monotonic() - started)


def observe_stream(events: Events, started: float, on_end: OnReply) -> StreamTap:
    """`observe` for a stream."""
    kept: list[str] = []
    first_s: float | None = None

    def keep(event: str) -> str:
        nonlocal first_s
        if first_s is None:
            first_s = time.monotonic() - started
        kept.append(event)
        return event

    async def parse() -> None:
        latency_s = time.monotonic() - started
        try:
            choices, usage, complete = read_events(kept)
        except Exception as error:  # whatever an endpoint streams: what the turn holds must be released
            logger.warning("a reply cannot be read, its turn is not recorded: %s", type(error).__name__)
            choices, usage, complete = (Choice(),), Usage(), False
        await on_end(ParsedReply(choices, usage, complete, first_s, latency_s))

    return StreamTap(events, on_event=keep, on_end=parse)


def read_events(events: Iterable[str]) -> tuple[tuple[Choice, ...], Usage, bool]:
    """(choices, usage, whether the stream came to its own end) of whole server-sent events."""
    builders: dict[int, ChoiceBuilder] = {0: ChoiceBuilder()}
    usage = Usage()
    complete = failed = False
    parser = SSEParser()
    for event in chain.from_iterable(map(parser.feed, events)):
        data = event.data.strip()
        if data == DONE:
            complete = True
        elif data.startswith("{"):
            try:
                chunk = json.loads(data)
            except ValueError:
                failed = True
                continue
            failed = failed or "error" in chunk
            usage = _usage(chunk["usage"]) if chunk.get("usage") else usage
            for choice in chunk.get("choices") or ():
                builders.setdefault(_index(choice), ChoiceBuilder()).add(choice.get("delta") or {})
    return tuple(builders[index].choice() for index in sorted(builders)), usage, complete and not failed


class ChoiceBuilder:
    """Puts one choice of a stream together."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, delta: Mapping[str, Any]) -> None:
        """Add one event's delta."""
        self._pieces.append(delta.get("content") or "")
        for part in delta.get("tool_calls") or ():
            call = self._calls.setdefault(_index(part), {"id": None, "type": "function", "function": {}})
            call["id"] = part.get("id") or call["id"]
            function, new = call["function"], part.get("function") or {}
            function["name"] = new.get("name") or function.get("name")
            function["arguments"] = function.get("arguments", "") + (new.get("arguments") or "")

    def choice(self) -> Choice:
        """The whole choice."""
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
