"""Answers of OpenAI-compatible endpoints, in OpenAI's own shape.

Guarantees: what has the shape already goes on as the same text; content in parts becomes its text, with the
thoughts in `reasoning_content`; arguments of calls are text, counts of tokens numbers; a whole completion and
the stream of it say the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from soma_vllm.engines.sse import DONE, ServerSentEvent, serialize
from soma_vllm.engines.upstream_errors import failure_in
from soma_vllm.errors import EngineUnavailable

DONE_EVENT = serialize(DONE)

_THOUGHTS = ("thinking", "reasoning")
"""Types of parts that hold thoughts, and the fields that they hold them in."""

_GROWING = ("content", "reasoning", "reasoning_content", "refusal")
"""Fields of a message of which a stream sends pieces."""


def event_of(event: ServerSentEvent) -> str | None:
    """An event of a stream as it is sent on; None for one that says nothing to a client.

    Raises:
        EngineRefused, EngineUnavailable: it reports an error.
    """
    try:
        found = json.loads(event.data)
        if not isinstance(found, dict):
            return None
        if (failed := failure_in(found, event.event)) is not None:
            raise failed
        if not isinstance(found.get("choices"), list) and not found.get("usage"):
            return None
        shaped = _shaped(found, "delta")
        as_it_came = shaped == found and "\n" not in event.data
        return serialize(event.data.strip() if as_it_came else _json(shaped))
    except (ValueError, RecursionError):
        return None  # no JSON, such as a word that keeps the connection alive


def completion_of(found: object) -> dict[str, Any]:
    """A whole completion.

    Raises:
        EngineRefused, EngineUnavailable: it reports an error, or is no completion.
    """
    if not isinstance(found, dict):
        raise EngineUnavailable(f"the original answered a {type(found).__name__}; expected an object")
    if (failed := failure_in(found)) is not None:
        raise failed
    if not isinstance(choices := found.get("choices"), list) or not choices:
        raise EngineUnavailable("the original answered an object without choices; expected a completion")
    return _shaped(found, "message")


def events_of(completion: Mapping[str, Any]) -> Iterator[str]:
    """The stream that says what a whole completion says."""
    text = completion.get("object") == "text_completion"
    head = {
        **{name: completion[name] for name in ("id", "created", "model") if name in completion},
        "object": "text_completion" if text else "chat.completion.chunk",
    }
    for choice in completion["choices"]:
        said = {name: value for name, value in choice.items() if name not in ("message", "finish_reason")}
        if not text:
            message = {"role": "assistant", **choice["message"]}
            if calls := message.get("tool_calls"):
                message["tool_calls"] = [{"index": index, **call} for index, call in enumerate(calls)]
            said["delta"] = message
        yield serialize(_json({**head, "choices": [{**said, "finish_reason": None}]}))
        nothing: dict[str, Any] = {"text": ""} if text else {"delta": {}}
        reason = choice.get("finish_reason") or "stop"
        ended = {"index": choice.get("index", 0), **nothing, "finish_reason": reason}
        yield serialize(_json({**head, "choices": [ended]}))
    if usage := completion.get("usage"):
        yield serialize(_json({**head, "choices": [], "usage": usage}))
    yield DONE_EVENT


def completion_from(events: Iterable[str]) -> dict[str, Any]:
    """The whole completion that says what a stream says, of events from `event_of`."""
    found: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        chunk = json.loads(event.removeprefix("data: "))
        found = {**chunk, **found, "usage": chunk.get("usage") or found.get("usage")}
        for delta in chunk["choices"]:
            _grow(choices.setdefault(delta.get("index") or 0, {}), delta)
    text = found.get("object") == "text_completion"
    found["object"] = "text_completion" if text else "chat.completion"
    found["choices"] = [{"index": index, **choices[index]} for index in sorted(choices)]
    return found


def tokens_in(value: object) -> int | None:
    """A count of tokens, which some endpoints write as text; None where it is none."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 10**15:
        return None
    return int(value)


def parts_in(content: object) -> tuple[str, str]:
    """(text, thoughts) of a message's content in any shape."""
    if content is None or isinstance(content, str):
        return content or "", ""
    text, thoughts = [], []
    for part in content if isinstance(content, list) else [content]:
        if not isinstance(part, Mapping):
            text.append("" if part is None else str(part))
        elif (kind := part.get("type")) in _THOUGHTS:
            thoughts.append(parts_in(part.get(kind, part.get("text")))[0])
        elif isinstance(part.get("text"), str):
            text.append(part["text"])
    return "".join(text), "".join(thoughts)


def arguments_in(value: object) -> str:
    """Arguments of a call as the JSON text that they are in OpenAI's shape."""
    return value if isinstance(value, str) else "" if value is None else _json(value)


def _shaped(found: Mapping[str, Any], part: str) -> dict[str, Any]:
    shaped = dict(found)
    choices = found.get("choices")
    listed = choices if isinstance(choices, list) else []
    shaped["choices"] = [_choice(choice, part) for choice in listed if isinstance(choice, dict)]
    if "usage" in found:
        usage = found["usage"]
        shaped["usage"] = _usage(usage) if isinstance(usage, Mapping) else None
    return shaped


def _choice(choice: dict[str, Any], part: str) -> dict[str, Any]:
    if part not in choice:
        return choice if "text" in choice else {**choice, part: {}}
    message = choice[part]
    if not isinstance(message, dict):
        return {**choice, part: {}}
    shaped = dict(message)
    if not isinstance(content := message.get("content"), str | None):
        shaped["content"], thoughts = parts_in(content)
        if thoughts and not message.get("reasoning_content"):
            shaped["reasoning_content"] = thoughts
    if calls := message.get("tool_calls"):
        listed = calls if isinstance(calls, list) else [calls]
        shaped["tool_calls"] = [_call(call) for call in listed if isinstance(call, dict)]
    return {**choice, part: shaped}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or isinstance(function.get("arguments"), str | None):
        return call
    return {**call, "function": {**function, "arguments": arguments_in(function["arguments"])}}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    """The usage with its counts as numbers."""
    return {
        name: tokens_in(value) if name.endswith("_tokens") and value is not None else value
        for name, value in usage.items()
    }


def _grow(choice: dict[str, Any], delta: Mapping[str, Any]) -> None:
    """Add one event's choice to the whole one."""
    if "text" in delta:
        choice["text"] = choice.get("text", "") + (delta["text"] or "")
    else:
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        said = delta.get("delta") or {}
        for name in _GROWING:
            if isinstance(piece := said.get(name), str):
                message[name] = (message.get(name) or "") + piece
        for call in said.get("tool_calls") or ():
            _grow_call(message.setdefault("tool_calls", []), call)
    if isinstance(logprobs := delta.get("logprobs"), Mapping) and logprobs.get("content"):
        choice.setdefault("logprobs", {"content": []})["content"] += logprobs["content"]
    choice["finish_reason"] = delta.get("finish_reason") or choice.get("finish_reason")


def _grow_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    index = piece.get("index") or 0
    call = next((call for call in calls if call["index"] == index), None)
    if call is None:
        call = {"index": index, "id": None, "type": "function", "function": {"name": "", "arguments": ""}}
        calls.append(call)
    function = piece.get("function") or {}
    call["id"] = piece.get("id") or call["id"]
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


def _json(value: object) -> str:
    # ASCII, so that half a surrogate pair can be sent at all.
    return json.dumps(value, separators=(",", ":"))
