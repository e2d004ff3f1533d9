"""A stream of chat events as the events of one response.

Guarantees: the first events are there at once, and each further one as soon as its words are; sequence numbers
count up from 0; the last event is the response itself, completed, incomplete or failed, and comes only when the
chat stream is over, so that the turn is on record when a client reads that it is done; closing the stream
closes the chat stream, also where nobody began to read.

The text of an answer is one item, whatever calls of tools stand between its pieces, and it stays open to the
end: a chat message is put together the same way, so that a client which sends the items back repeats the turn
that is on record.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Self

from soma_vllm.api.responses.convert import (
    CUT_OFF,
    Frame,
    call_id_of,
    call_item,
    logprobs_of,
    message_item,
    new_id,
    reasoning_item,
    text_in,
    thoughts_in,
)
from soma_vllm.engines.engine import Events
from soma_vllm.errors import SomaError

Event = tuple[str, dict[str, Any]]
"""(type, its other fields)."""


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
            await self.aclose()
            return list(self._telling.failed(str(error)))
        except ValueError:
            await self.aclose()
            return list(self._telling.failed("the engine sent an event that is no JSON object"))


class Item(ABC):
    """An output item that is being told."""

    def __init__(self, kind: str, place: int) -> None:
        """`kind` begins its id; `place` is its index in the output."""
        self.id = new_id(kind)
        self.status = "in_progress"
        self._place = place
        self._pieces: list[str] = []

    @abstractmethod
    def json(self) -> dict[str, Any]:
        """The item as it stands."""

    def begin(self) -> Iterator[Event]:
        """Its first events."""
        yield "response.output_item.added", {"output_index": self._place, "item": self.json()}

    def end(self, status: str) -> Iterator[Event]:
        """Its last events."""
        self.status = status
        yield "response.output_item.done", {"output_index": self._place, "item": self.json()}

    def _event(self, kind: str, **fields: Any) -> Event:
        return f"response.{kind}", {"item_id": self.id, "output_index": self._place, **fields}


class Spoken(Item):
    """An item with one part of text, which events call by `name`."""

    name: str

    def begin(self) -> Iterator[Event]:
        """The item without its part, then the part."""
        added = {**self.json(), "content": []}
        yield "response.output_item.added", {"output_index": self._place, "item": added}
        yield self._event("content_part.added", content_index=0, part=self.json()["content"][0])

    def end(self, status: str) -> Iterator[Event]:
        """All of the text, the part, the item."""
        part = self.json()["content"][0]
        done = {"text": part["text"]} | ({"logprobs": part["logprobs"]} if "logprobs" in part else {})
        yield self._event(f"{self.name}.done", content_index=0, **done)
        yield self._event("content_part.done", content_index=0, part=part)
        yield from super().end(status)


class Thoughts(Spoken):
    """What the model thinks."""

    name = "reasoning_text"

    def json(self) -> dict[str, Any]:
        """See `Item`."""
        return reasoning_item(self.id, "".join(self._pieces), self.status)

    def add(self, text: str) -> Iterator[Event]:
        """More of it."""
        self._pieces.append(text)
        yield self._event(f"{self.name}.delta", content_index=0, delta=text)


class Answer(Spoken):
    """What the model answers."""

    name = "output_text"

    def __init__(self, kind: str, place: int) -> None:
        super().__init__(kind, place)
        self._logprobs: list[dict[str, Any]] = []

    def json(self) -> dict[str, Any]:
        """See `Item`."""
        return message_item(self.id, "".join(self._pieces), self._logprobs, self.status)

    def add(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """More of it. Tokens without text, such as the end of the turn, have log-probabilities all the same."""
        self._logprobs += logprobs
        if text:
            self._pieces.append(text)
            yield self._event(f"{self.name}.delta", content_index=0, delta=text, logprobs=logprobs)


class Call(Item):
    """A call of a tool."""

    def __init__(self, kind: str, place: int, call: Mapping[str, Any]) -> None:
        super().__init__(kind, place)
        self._call_id = call_id_of(call)
        self._name = (call.get("function") or {}).get("name") or ""

    def json(self) -> dict[str, Any]:
        """See `Item`."""
        return call_item(self.id, self._call_id, self._name, "".join(self._pieces), self.status)

    def add(self, arguments: str) -> Iterator[Event]:
        """More of its arguments."""
        self._pieces.append(arguments)
        yield self._event("function_call_arguments.delta", delta=arguments)

    def end(self, status: str) -> Iterator[Event]:
        """All of the arguments, the item."""
        done = {"name": self._name, "arguments": "".join(self._pieces)}
        yield self._event("function_call_arguments.done", **done)
        yield from super().end(status)


class Telling:
    """Makes the events of a response from what a chat stream says."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        self._items: list[Item] = []
        self._thoughts: Thoughts | None = None
        """Those that go on."""
        self._answer: Answer | None = None
        self._calls: dict[int, Call] = {}
        self._usage: Mapping[str, Any] | None = None
        self._finish = ""
        self._error: str | None = None
        self._done = False

    def began(self) -> Iterator[Event]:
        """The events that come before any word."""
        response = self._frame.response("in_progress")
        yield "response.created", {"response": response}
        yield "response.in_progress", {"response": response}

    def heard(self, event: str) -> Iterator[Event]:
        """What one chat event adds.

        Raises:
            ValueError: it is no JSON object.
        """
        data = "".join(line[5:].strip() for line in event.split("\n") if line.startswith("data:"))
        if not data:
            return
        if data == "[DONE]":
            self._done = True
            return
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            raise ValueError
        if error := chunk.get("error"):
            self._error = str(error.get("message") if isinstance(error, dict) else error)
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk.get("choices") or ():
            if not choice.get("index"):
                yield from self._choice(choice)

    def ended(self) -> Iterator[Event]:
        """What is left to say when the chat stream is over."""
        if self._error is not None or not self._done:
            yield from self.failed(self._error or "the engine's stream ended in the middle of an answer")
            return
        if self._answer is None and not self._calls:
            yield from self._answering().begin()
        cut_off = CUT_OFF.get(self._finish)
        status = "completed" if cut_off is None else "incomplete"
        for item in self._items:
            if item.status == "in_progress":
                yield from item.end(status if item is self._items[-1] else "completed")
        output = [item.json() for item in self._items]
        yield (
            f"response.{status}",
            {"response": self._frame.response(status, output, self._usage, cut_off=cut_off)},
        )

    def failed(self, why: str) -> Iterator[Event]:
        """The end of a response that failed in the middle."""
        for item in self._items:
            if item.status == "in_progress":
                item.status = "incomplete"
        output = [item.json() for item in self._items]
        yield "response.failed", {"response": self._frame.response("failed", output, self._usage, error=why)}

    def _choice(self, choice: Mapping[str, Any]) -> Iterator[Event]:
        self._finish = choice.get("finish_reason") or self._finish
        delta = choice.get("delta") or {}
        if thoughts := thoughts_in(delta):
            yield from self._think(thoughts)
        text = text_in(delta)
        if text and self._answer is None:
            yield from self._end_thoughts()
            yield from self._answering().begin()
        if self._answer is not None:
            shown = (choice.get("logprobs") or {}).get("content") if self._frame.asked.wants_logprobs else ()
            yield from self._answer.add(text, logprobs_of(shown))
        for part in delta.get("tool_calls") or ():
            yield from self._call(part)

    def _think(self, text: str) -> Iterator[Event]:
        if self._thoughts is None:
            self._thoughts = Thoughts("rs", len(self._items))
            self._items.append(self._thoughts)
            yield from self._thoughts.begin()
        yield from self._thoughts.add(text)

    def _end_thoughts(self) -> Iterator[Event]:
        if self._thoughts is not None:
            yield from self._thoughts.end("completed")
            self._thoughts = None

    def _answering(self) -> Answer:
        self._answer = Answer("msg", len(self._items))
        self._items.append(self._answer)
        return self._answer

    def _call(self, part: Mapping[str, Any]) -> Iterator[Event]:
        index = part.get("index") or 0
        if index not in self._calls:
            yield from self._end_thoughts()
            self._calls[index] = call = Call("fc", len(self._items), part)
            self._items.append(call)
            yield from call.begin()
        if arguments := (part.get("function") or {}).get("arguments"):
            yield from self._calls[index].add(arguments)
