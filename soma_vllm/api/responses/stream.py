"""A chat completion, whole or streamed, as the output and the events of one response.

Guarantees: a stream and a whole reply with the same words are the same response. The first events are there at
once, and each further one as soon as its words are; sequence numbers count up from 0; the last event is the
response itself, completed, incomplete or failed, and comes only when the chat stream is over, so that the turn
is on record when a client reads that it is done; closing the stream closes the chat stream, also before its
first event was read.

The text of an answer is one item, even where calls of tools stand between its pieces, and it stays open to the
end: a chat message is put together the same way, so that a client which sends the items back repeats the turn
that is on record.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from openai.types.responses import (
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseReasoningItem,
)
from openai.types.responses.response_reasoning_item import Content as ReasoningText

from soma_vllm.api.responses.convert import CUT_OFF, Frame, logprobs_in, new_id, reasoning_in, text_in
from soma_vllm.engines.engine import Events
from soma_vllm.engines.sse import DONE, data_of, serialize
from soma_vllm.errors import EngineError, SomaError


def response_of(frame: Frame, completion: Mapping[str, Any]) -> dict[str, Any]:
    """The response that a whole chat completion becomes.

    Raises:
        EngineError: it holds no answer.
    """
    choices = completion.get("choices") or ()
    choice = next((choice for choice in choices if not choice.get("index")), None)
    if choice is None:
        raise EngineError("found no choice in the engine's reply; expected one")
    builder = ResponseBuilder(frame)
    message = choice.get("message") or {}
    calls = message.get("tool_calls") or ()
    if reasoning := reasoning_in(message):
        builder.add_reasoning(reasoning)
    if (text := text_in(message)) or not calls:
        builder.add_text(text, choice)
    for index, call in enumerate(calls):
        builder.add_call({**call, "index": index})
    builder.finish, builder.usage = choice.get("finish_reason"), completion.get("usage")
    return builder.complete()


OnComplete = Callable[[dict[str, Any]], None]


def ignored(response: dict[str, Any]) -> None:
    """What is done with a response that is not kept."""


class ResponseEvents:
    """`Events` of a response, made of a chat completion's.

    A class and not an async generator, because closing a generator that was never started runs none of it.
    """

    def __init__(self, events: Events, frame: Frame, on_complete: OnComplete = ignored) -> None:
        """`on_complete` is given the whole response, once its turn is on record."""
        self._events = events
        self._on_complete = on_complete
        self._builder = ResponseBuilder(frame)
        self._builder.begin()
        self._error: str | None = None
        self._done = False
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while not self._builder.events:
            if self._over:
                raise StopAsyncIteration
            await self._read()
        return self._builder.events.popleft()

    async def aclose(self) -> None:
        """Stop the generation; harmless when it is over."""
        self._over = True
        self._builder.events.clear()
        await self._events.aclose()

    async def _read(self) -> None:
        """Take the next chat event, or the end."""
        try:
            self._take(await anext(self._events))
        except StopAsyncIteration:
            self._over = True
            if self._done and self._error is None:
                self._on_complete(self._builder.complete())
            else:
                cut_off = "the engine's stream ended in the middle of an answer"
                self._builder.fail(self._error or cut_off)
        except (SomaError, ValueError) as error:
            await self.aclose()
            broken = "the engine sent an event that is no JSON object"
            self._builder.fail(str(error) if isinstance(error, SomaError) else broken)

    def _take(self, event: str) -> None:
        data = (data_of(event) or "").strip()
        if not data:
            return
        if data == DONE:
            self._done = True
            return
        chunk = json.loads(data)
        if not isinstance(chunk, dict):
            raise ValueError
        if error := chunk.get("error"):
            self._error = str(error.get("message") if isinstance(error, dict) else error)
        self._builder.usage = chunk.get("usage") or self._builder.usage
        for choice in chunk.get("choices") or ():
            if not choice.get("index"):
                self._builder.add_delta(choice)


@dataclass
class _Item:
    """An item of the output. Its parts are not validated: an engine may say more than OpenAI's types allow."""

    index: int
    item: Any
    part: Any
    """The part that grows; None in a call, which grows by its arguments."""

    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = self.item.model_dump(exclude_unset=True, warnings=False)
        return found


class ResponseBuilder:
    """Puts the output of one response together, and the events that tell of it."""

    def __init__(self, frame: Frame) -> None:
        self.events: deque[str] = deque()
        """Server-sent events that were not taken yet."""
        self.usage: Mapping[str, Any] | None = None
        """The chat completion's."""
        self.finish: str | None = None
        """The chat completion's `finish_reason`."""
        self._number = 0
        self._frame = frame
        self._items: list[_Item] = []
        self._reasoning: _Item | None = None
        """The one that still grows."""
        self._answer: _Item | None = None
        self._calls: dict[int, _Item] = {}

    def begin(self) -> None:
        """The events that come before any word."""
        response = self._frame.response("in_progress")
        self._emit("created", response=response)
        self._emit("in_progress", response=response)

    def add_delta(self, choice: Mapping[str, Any]) -> None:
        """Add what one event of a chat stream says."""
        self.finish = choice.get("finish_reason") or self.finish
        delta = choice.get("delta") or {}
        if reasoning := reasoning_in(delta):
            self.add_reasoning(reasoning)
        if (text := text_in(delta)) or self._answer is not None:
            self.add_text(text, choice)
        for call in delta.get("tool_calls") or ():
            self.add_call(call)

    def add_reasoning(self, text: str) -> None:
        """Add to the reasoning."""
        if self._reasoning is None:
            part = ReasoningText(type="reasoning_text", text="")
            item = ResponseReasoningItem(
                id=new_id("rs"), type="reasoning", status="in_progress", summary=[], content=[part]
            )
            self._reasoning = self._open(item, part)
        self._grow(self._reasoning, text)

    def add_text(self, text: str, choice: Mapping[str, Any]) -> None:
        """Add to the answer. Tokens without text, such as the end of the turn, have log-probabilities too."""
        if self._answer is None:
            self._end_reasoning()
            self._answer = self._open_answer()
        logprobs = logprobs_in(choice) if self._frame.request.wants_logprobs else []
        self._answer.part.logprobs += logprobs
        if text:
            self._grow(self._answer, text, logprobs=logprobs)

    def add_call(self, call: Mapping[str, Any]) -> None:
        """Add to the call of a tool."""
        index, function = call.get("index") or 0, call.get("function") or {}
        if index not in self._calls:
            self._end_reasoning()
            item = ResponseFunctionToolCall(
                id=new_id("fc"),
                type="function_call",
                status="in_progress",
                call_id=str(call.get("id") or new_id("call")),
                name=str(function.get("name") or ""),
                arguments="",
            )
            self._calls[index] = self._open(item)
        if arguments := function.get("arguments"):
            self._grow(self._calls[index], arguments)

    def complete(self) -> dict[str, Any]:
        """End what is open; the response, which is also the last event."""
        if self._answer is None and not self._calls:
            self._answer = self._open_answer()
        cut_off = CUT_OFF.get(self.finish or "")
        status = "completed" if cut_off is None else "incomplete"
        for item in self._items:
            if item.item.status == "in_progress":
                self._close(item, status if item is self._items[-1] else "completed")
        details = {} if cut_off is None else {"incomplete_details": {"reason": cut_off}}
        return self._end(status, **details)

    def fail(self, why: str) -> None:
        """End a response that failed in the middle."""
        for item in self._items:
            if item.item.status == "in_progress":
                item.item.status = "incomplete"
        self._end("failed", error={"code": "server_error", "message": why})

    def _end(self, status: str, **details: Any) -> dict[str, Any]:
        response = self._frame.response(status, [item.json() for item in self._items], self.usage, **details)
        self._emit(status, response=response)
        return response

    def _emit(self, kind: str, **fields: Any) -> None:
        event = {"type": f"response.{kind}", "sequence_number": self._number, **fields}
        self._number += 1
        # ASCII, so that half a surrogate pair, in which some servers cut an emoji, can be sent at all.
        self.events.append(serialize(json.dumps(event), event["type"]))

    def _tell(self, item: _Item, kind: str, **fields: Any) -> None:
        place = {} if item.part is None else {"content_index": 0}
        self._emit(kind, item_id=item.item.id, output_index=item.index, **place, **fields)

    def _open(self, item: Any, part: Any = None) -> _Item:
        opened = _Item(len(self._items), item, part)
        self._items.append(opened)
        added = opened.json() if part is None else {**opened.json(), "content": []}
        self._emit("output_item.added", output_index=opened.index, item=added)
        if part is not None:
            self._tell(opened, "content_part.added", part=part.model_dump())
        return opened

    def _open_answer(self) -> _Item:
        part = ResponseOutputText(type="output_text", text="", annotations=[], logprobs=[])
        item = ResponseOutputMessage(
            id=new_id("msg"), type="message", role="assistant", status="in_progress", content=[part]
        )
        return self._open(item, part)

    def _grow(self, item: _Item, delta: str, **fields: Any) -> None:
        if item.part is None:
            item.item.arguments += delta
            self._tell(item, "function_call_arguments.delta", delta=delta)
        else:
            item.part.text += delta
            self._tell(item, f"{item.part.type}.delta", delta=delta, **fields)

    def _close(self, item: _Item, status: str) -> None:
        item.item.status = status
        if item.part is None:
            whole = {"name": item.item.name, "arguments": item.item.arguments}
            self._tell(item, "function_call_arguments.done", **whole)
        else:
            part = item.part.model_dump(warnings=False)
            whole = {name: part[name] for name in ("text", "logprobs") if name in part}
            self._tell(item, f"{item.part.type}.done", **whole)
            self._tell(item, "content_part.done", part=part)
        self._emit("output_item.done", output_index=item.index, item=item.json())

    def _end_reasoning(self) -> None:
        if self._reasoning is not None:
            self._close(self._reasoning, "completed")
            self._reasoning = None
