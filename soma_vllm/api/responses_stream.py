"""A stream of chat events as the events of one response.

Guarantees: the first events are there at once, and each further one as soon as its words are; sequence numbers
count up from 0; the last event is the response itself, completed, incomplete or failed, and comes only when the
chat stream is over, so that the turn is on record when a client reads that it is done; closing the stream closes
the chat stream, also one that nobody began to read.

An answer's text is one item, whatever tools are called in between, and items stay open to the end: a chat message
is put together the same way, and a client that sends the items back repeats the turn on record.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, Self

from soma_vllm.api.responses_shapes import (
    CUT_OFF,
    Frame,
    call_id_of,
    call_item,
    logprobs_of,
    message_item,
    new_id,
    reasoning_item,
    reasoning_part,
    text_in,
    text_part,
    thoughts_in,
)
from soma_vllm.engines.base import Events
from soma_vllm.errors import SomaError

Event = tuple[str, dict[str, Any]]
"""(type, its fields)."""


class ResponseEvents:
    """`Events` of a response, made of a chat completion's.

    A class and not an async generator, because closing a generator that nobody began to read runs none of it.
    """

    def __init__(self, events: Events, frame: Frame) -> None:
        self._events = events
        self._telling = Telling(frame)
        self._waiting = deque(self._telling.began())
        self._number = 0
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._waiting:
            if self._over:
                raise StopAsyncIteration
            self._waiting.extend(await self._next())
        kind, fields = self._waiting.popleft()
        data = {"type": kind, "sequence_number": self._number, **fields}
        self._number += 1
        # ASCII, so that half a surrogate pair, in which some servers cut an emoji, can be sent at all.
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    async def aclose(self) -> None:
        """Stop the generation; harmless when it is over."""
        self._over = True
        self._waiting.clear()
        await self._events.aclose()

    async def _next(self) -> list[Event]:
        try:
            return list(self._telling.heard(await anext(self._events)))
        except StopAsyncIteration:
            self._over = True
            return list(self._telling.ended())
        except SomaError as error:
            self._over = True
            return self._telling.failed(str(error))
        except ValueError:
            await self.aclose()
            return self._telling.failed("the engine sent an event that is not JSON")


class Item(Protocol):
    """An output item that is being told."""

    def done(self, status: str) -> Iterator[Event]:
        """Its last events."""
        ...

    def so_far(self, status: str) -> dict[str, Any]:
        """The item as it stands."""
        ...


class Telling:
    """Makes the events of a response from what a chat stream says."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._items: list[Item] = []
        self._thoughts: Thoughts | None = None
        self._answer: Answer | None = None
        self._calls: dict[int, Call] = {}
        self._usage: Mapping[str, Any] | None = None
        self._finish = ""
        self._failure: str | None = "the engine's stream ended in the middle of an answer"

    def began(self) -> list[Event]:
        """The events that come before any word."""
        response = self._frame.response("in_progress")
        return [("response.created", {"response": response}), ("response.in_progress", {"response": response})]

    def heard(self, event: str) -> Iterator[Event]:
        """What one chat event adds.

        Raises:
            ValueError: it is not JSON.
        """
        data = "".join(line[5:].strip() for line in event.split("\n") if line.startswith("data:"))
        if data == "[DONE]":
            if self._finish != "error":
                self._failure = None
            return
        chunk = json.loads(data) if data else {}
        if chunk.get("error"):
            self._fail(chunk["error"])
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            if not choice.get("index"):
                yield from self._choice(choice)

    def ended(self) -> Iterator[Event]:
        """What is left to say when the chat stream is over."""
        if self._failure is not None:
            yield from self.failed(self._failure)
            return
        if self._answer is None and not self._calls:
            yield from self._begin_answer()
        cut_off = CUT_OFF.get(self._finish)
        status = "completed" if cut_off is None else "incomplete"
        output = []
        for item in self._items:
            ending = status if item is self._items[-1] else "completed"
            yield from () if item is self._thoughts_told(item) else item.done(ending)
            output.append(item.so_far(ending))
        response = self._frame.response(status, output, self._usage, cut_off=cut_off)
        yield f"response.{status}", {"response": response}

    def failed(self, why: str) -> list[Event]:
        """The end of a response that failed in the middle."""
        output = [item.so_far("incomplete") for item in self._items]
        return [("response.failed", {"response": self._frame.response("failed", output, self._usage, error=why)})]
