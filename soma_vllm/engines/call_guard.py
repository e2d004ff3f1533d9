"""Keeps a surrogate's malformed calls of tools from clients.

Guarantees: a reply that came whole is handed over only if its calls are of functions that the request declares,
with arguments that are valid for them. Of a stream, words pass as they come; from the first piece of a call on
everything is held back until the stream has ended and its calls are valid. A stream is handed over once its
first words have come, or once it has ended: until then malformed calls are an exception that another engine can
make good. After words were passed on, they end the stream with an error.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

from soma_vllm.engines.engine import Events, Reply
from soma_vllm.engines.reply_parser import Choice, StreamReader, parse_body
from soma_vllm.engines.tool_calls import Mismatch, fault
from soma_vllm.errors import MalformedCall


async def with_valid_calls(reply: Reply, asked: Mapping[str, Any]) -> Reply:
    """The reply to a request, guarded.

    Raises:
        MalformedCall: it calls a tool as the request does not allow.
        EngineUnavailable: its stream broke before its first words.
    """
    tools = asked.get("tools")
    if not tools:
        return reply
    if reply.events is not None:
        guarded = _GuardedStream(reply.events, tools)
        await guarded.begin()
        return Reply(events=guarded)
    assert reply.body is not None
    _require_valid(parse_body(reply.body, time.monotonic()).choices, tools)
    return reply


class _GuardedStream:
    """`Events` whose calls of tools are passed on whole and valid, or not at all."""

    def __init__(self, events: Events, tools: object) -> None:
        self._events = events
        self._tools = tools
        self._reader = StreamReader()
        self._ended = False
        self._ready: deque[str] = deque()
        """Events that may be passed on."""

    async def begin(self) -> None:
        """Wait for the first words, or for the end."""
        await self._read(silent=True)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if not self._ready:
            await self._read(silent=False)
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Stop the generation; harmless when it is over."""
        self._ready.clear()
        await self._events.aclose()

    async def _read(self, silent: bool) -> None:
        """Make further events ready; `silent`: not before there are words among them."""
        held: list[str] = []
        try:
            async for event in self._events:
                self._reader.add(event)
                held.append(event)
                if not self._reader.called and (self._reader.spoke or not silent):
                    break
            else:
                if not self._ended:
                    self._ended = True
                    _require_valid(self._reader.reply(None, 0.0).choices, self._tools)
        except BaseException:
            await self.aclose()
            raise
        self._ready.extend(held)


def _require_valid(choices: Sequence[Choice], tools: object) -> None:
    found = fault([call for choice in choices for call in choice.calls], tools)
    if found is not None and found is not Mismatch.UNVERIFIABLE:
        raise MalformedCall(f"the surrogate's call of a tool is malformed: {found}")
