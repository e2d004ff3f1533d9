"""Observes a reply: what it said, its tokens, its times, and whether it ended by itself.

Guarantees: what is heard never breaks what the client hears: an event that cannot be read passes as it came,
and makes the reply an incomplete one; `on_end` is awaited once, and its failure is logged and goes no further.
A stream is read as it passes, and of it only the words are kept, to a fixed number of characters. The only
thing that is taken off a stream is the count of tokens that we asked for and the client did not.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from soma_vllm.engines.dialect import arguments_in, parts_in, tokens_in
from soma_vllm.engines.engine import Events, Reply
from soma_vllm.engines.sse import DONE, data_of, parse
from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.types import Usage

logger = logging.getLogger(__name__)

MOST_CHARS = 16 * 1024 * 1024
"""Of one reply's words. What is longer is passed on and not recorded."""

MOST_CHOICES = 1024
JOINED = 64
"""Pieces of a stream that are kept as one text."""
MIB = 1024 * 1024


class HeardWords:
    """What all replies under way have said so far, within a bound."""

    def __init__(self, most_mib: int = 256) -> None:
        self._most = most_mib * MIB
        self.characters = 0

    def take(self, characters: int) -> bool:
        """Hold so many more characters; whether there is room for them."""
        if self.characters + characters > self._most:
            return False
        self.characters += characters
        return True

    def give_back(self, characters: int) -> None:
        """Hold so many no more."""
        self.characters -= characters


_NO_USAGE = re.compile(r',\s*"usage"\s*:\s*null')
"""Inside a JSON string the quotes would be escaped."""


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
    at_least: int = 0
    """Tokens that were generated, where `usage` does not say: a lower bound."""

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


async def observe(
    reply: Reply,
    started: float,
    on_end: OnReply,
    hide_usage: bool = False,
    heard: HeardWords | None = None,
) -> Reply:
    """The same reply; `on_end` is awaited once, with what it said, when it is over.

    `started` is the request's arrival, `time.monotonic`. `hide_usage`: a stream's count of tokens is heard, but
    not passed on. `heard` bounds what a stream's words may take beside others'.
    """
    if reply.events is not None:
        return replace(reply, events=observe_stream(reply.events, started, on_end, hide_usage, heard))
    assert reply.body is not None
    await _end(on_end, parse_body(reply.body, started))
    return reply


def parse_body(body: Mapping[str, Any], started: float) -> ParsedReply:
    """What a reply that came in one piece said."""
    latency_s = time.monotonic() - started
    try:
        found = sorted(body.get("choices") or (), key=_index)
        choices = tuple(_choice(choice.get("message") or {}) for choice in found) or (Choice(),)
        at_least = sum(len(choice.text) for choice in choices) // CHARS_PER_TOKEN
        return ParsedReply(choices, _usage(body.get("usage")), True, None, latency_s, at_least)
    except Exception as error:  # whatever an endpoint answers
        logger.warning("a reply cannot be read, its turn is not recorded: %s", type(error).__name__)
        return ParsedReply((Choice(),), Usage(), False, None, latency_s)


CHARS_PER_TOKEN = 4
"""Of English under common tokenizers; other scripts have fewer."""


def observe_stream(
    events: Events,
    started: float,
    on_end: OnReply,
    hide_usage: bool = False,
    heard: HeardWords | None = None,
) -> StreamTap:
    """`observe` for a stream."""
    reader = StreamReader(heard)
    first_s: float | None = None

    def hear(event: str) -> str | None:
        nonlocal first_s
        if first_s is None:
            first_s = time.monotonic() - started
        counts_only = reader.add(event)
        if not hide_usage:
            return event
        return None if counts_only else _NO_USAGE.sub("", event) if '"usage"' in event else event

    async def parsed() -> None:
        try:
            await _end(on_end, reader.reply(first_s, time.monotonic() - started))
        finally:
            reader.close()

    return StreamTap(events, on_event=hear, on_end=parsed)


async def _end(on_end: OnReply, reply: ParsedReply) -> None:
    try:
        await on_end(reply)
    except Exception as error:  # the client has its answer, whatever becomes of the record
        # Without its message, which may quote what was said.
        logger.error("a turn was answered and not recorded: %s", type(error).__name__)


class StreamReader:
    """Reads a stream, event by event."""

    def __init__(self, heard: HeardWords | None = None) -> None:
        self._heard = heard or HeardWords()
        self._held = 0
        """Of what was heard, characters."""
        self._builders: dict[int, ChoiceBuilder] = {0: ChoiceBuilder()}
        self._usage = Usage()
        self._complete = False
        self._unread = False
        self._full = False
        """An event reported an error, or could not be read."""
        self._chars = 0
        self._pieces = 0
        self.spoke = False
        """There was content, more than blanks."""
        self.called = False
        """There was a piece of a call of a tool."""

    def add(self, event: str) -> bool:
        """Read one event as it is sent; whether it holds the count of tokens and nothing else. Never raises."""
        try:
            whole = data_of(event) if event.count("\n\n") <= 1 else None
            data = [one.data for one in parse(event)] if whole is None else [whole]
            return [self._read(one.strip()) for one in data] == [True]
        except Exception as error:  # whatever an endpoint streams
            if not self._unread:
                logger.warning("a stream cannot be read, its turn is incomplete: %s", type(error).__name__)
            self._unread = True
            return False

    def reply(self, ttft_s: float | None, latency_s: float) -> ParsedReply:
        """What the stream said so far."""
        choices = tuple(self._builders[index].choice() for index in sorted(self._builders))
        complete = self._complete and not self._unread
        return ParsedReply(choices, self._usage, complete, ttft_s, latency_s, self._pieces)

    def close(self) -> None:
        """Give back what was held of the bound; harmless again."""
        self._heard.give_back(self._held)
        self._held = 0

    def _room(self, choice: Mapping[str, Any]) -> bool:
        """Whether what a choice adds may be held."""
        delta = choice.get("delta") or {}
        content = delta.get("content")
        size = len(content) if isinstance(content, str) else len(str(content or ""))
        for part in delta.get("tool_calls") or ():
            size += len(str((part.get("function") or {}).get("arguments") or ""))
        if self._full or not self._heard.take(size):
            self._full = True  # what comes later is no continuation
            return False
        self._held += size
        return True

    def _read(self, data: str) -> bool:
        if data == DONE:
            self._complete = True
        if not data.startswith("{"):
            return False
        chunk = json.loads(data)
        self._unread = self._unread or bool(chunk.get("error"))
        choices, usage = chunk.get("choices") or (), chunk.get("usage")
        if usage:
            self._usage = _usage(usage)
        for choice in choices:
            self._pieces += bool(_spoken(choice.get("delta") or choice))
            delta = choice.get("delta") or {}
            self.called = self.called or bool(delta.get("tool_calls"))
            self.spoke = self.spoke or bool(parts_in(delta.get("content"))[0].strip())
            self._chars += len(data)
            if self._chars > MOST_CHARS or len(self._builders) > MOST_CHOICES or not self._room(choice):
                self._unread = True
            else:
                self._builders.setdefault(_index(choice), ChoiceBuilder()).add(delta)
        return bool(usage) and not choices


class ChoiceBuilder:
    """Puts one choice of a stream together."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._pieces: list[str] = []
        """The latest: each is ten times as large as its words."""
        self._calls: dict[int, dict[str, Any]] = {}

    def add(self, delta: Mapping[str, Any]) -> None:
        """Add one event's delta."""
        if text := parts_in(delta.get("content"))[0]:
            self._pieces.append(text)
            if len(self._pieces) == JOINED:
                self._text.append("".join(self._pieces))
                self._pieces.clear()
        for part in delta.get("tool_calls") or ():
            call = self._calls.setdefault(_index(part), {"id": None, "type": "function", "function": {}})
            call["id"] = part.get("id") or call["id"]
            function, new = call["function"], part.get("function") or {}
            function["name"] = new.get("name") or function.get("name")
            function["arguments"] = function.get("arguments", "") + arguments_in(new.get("arguments"))

    def choice(self) -> Choice:
        """The whole choice."""
        return Choice(
            "".join((*self._text, *self._pieces)), tuple(self._calls[index] for index in sorted(self._calls))
        )


def _choice(message: Mapping[str, Any]) -> Choice:
    calls = tuple(dict(call) for call in message.get("tool_calls") or ())
    return Choice(parts_in(message.get("content"))[0], calls)


def _spoken(delta: Mapping[str, Any]) -> bool:
    """Whether a delta, or a text completion's choice, holds words."""
    return any(delta.get(name) for name in ("content", "reasoning", "reasoning_content", "tool_calls", "text"))


def _index(part: Mapping[str, Any]) -> int:
    index = part.get("index")
    return index if isinstance(index, int) else 0


def _usage(found: object) -> Usage:
    if not isinstance(found, Mapping):
        return Usage()
    details = found.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, Mapping) else None
    return Usage(
        tokens_in(found.get("prompt_tokens")), tokens_in(cached), tokens_in(found.get("completion_tokens"))
    )
