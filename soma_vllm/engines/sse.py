"""Server-sent events: a parser and a serializer after the WHATWG standard, section "Server-sent events".

Guarantees: lines may end in "\\n", "\\r\\n" or "\\r"; a leading byte order mark, comments and unknown fields
are ignored; one space after the colon is not part of a value; several `data` lines are one value, joined by
"\\n"; an event without a `data` line is not dispatched, nor is one that the end of the stream cuts off. How the
network cuts the stream into pieces makes no difference. No event holds more than a fixed number of characters.

`retry` is ignored: a completion that broke off is not resumed by reconnecting.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass

from soma_vllm.errors import EngineUnavailable

MAX_EVENT_CHARS = 16 * 1024 * 1024
"""Of one event. The largest events of completions carry log-probabilities, and have some thousands."""

DONE = "[DONE]"
"""Data of the last event of a stream of OpenAI's completions."""

_LINE_END = re.compile(r"\r\n|\n|\r")


@dataclass(frozen=True)
class ServerSentEvent:
    """One event of a stream."""

    data: str
    event: str = "message"
    """Its type."""
    id: str = ""
    """The `id` that the stream named last."""

    def __str__(self) -> str:
        """The event as it is sent, but for its id."""
        return serialize(self.data, None if self.event == "message" else self.event)


class SSEParser:
    """Parses one stream, piece by piece."""

    def __init__(self, max_chars: int = MAX_EVENT_CHARS) -> None:
        self._max_chars = max_chars
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._at_start = True
        self._after_cr = False
        """A "\\n" that comes now belongs to the line end before it."""
        self._line: list[str] = []
        """Pieces of the line that has not ended."""
        self._data: list[str] = []
        self._event = ""
        self._id = ""
        self._held = 0
        """Characters of the event so far."""

    def feed(self, piece: bytes | str) -> Iterator[ServerSentEvent]:
        """The events that a piece completes. To be read to its end before the next piece.

        Raises:
            EngineUnavailable: an event is too long.
        """
        text = piece if isinstance(piece, str) else self._decoder.decode(piece)
        if not text:
            return
        if self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if self._after_cr:
            text = text.removeprefix("\n")
        self._after_cr = text.endswith("\r")
        *ended, rest = _LINE_END.split(text)
        for line in ended:
            self._keep(line)
            whole = "".join(self._line)
            self._line.clear()
            if whole:
                self._field(whole)
            elif (event := self._dispatched()) is not None:
                yield event
        self._keep(rest)

    def _keep(self, part: str) -> None:
        if part:
            self._held += len(part)
            if self._held > self._max_chars:
                raise EngineUnavailable(
                    f"found a server-sent event of more than {self._max_chars} characters; "
                    "expected at most that"
                )
            self._line.append(part)

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
            return
        # Nothing else is kept for long: comments may go on for as long as they like.
        self._held -= len(line)
        if name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id = value

    def _dispatched(self) -> ServerSentEvent | None:
        data, event = self._data, self._event
        self._data, self._event, self._held = [], "", 0
        return ServerSentEvent("\n".join(data), event or "message", self._id) if data else None


def parse(text: str) -> list[ServerSentEvent]:
    """The events of a whole stream.

    Raises:
        EngineUnavailable: an event is too long.
    """
    return list(SSEParser().feed(text))


def data_of(event: str) -> str | None:
    """The data of one whole event as it is sent; None where it has none, as a comment.

    Raises:
        EngineUnavailable: the event is too long.
    """
    if event.startswith("data: ") and event.find("\n") == len(event) - 2 and "\r" not in event:
        return event[6:-2]  # one line, as engines write it: no need to parse
    return next((found.data for found in parse(event)), None)


def serialize(data: str, event: str | None = None) -> str:
    """An event as it is sent. Line ends in `data` are read back as "\\n".

    Raises:
        ValueError: the type holds a line end.
    """
    if event is not None and _LINE_END.search(event):
        raise ValueError("event: found a line end; expected the type of an event")
    head = "" if event is None else f"event: {event}\n"
    lines = _LINE_END.split(data) if "\n" in data or "\r" in data else (data,)
    return head + "".join(f"data: {line}\n" for line in lines) + "\n"
