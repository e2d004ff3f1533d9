"""Items of OpenAI's Responses API as chat messages.

Guarantees: pure; the same dialogue gives the same messages whether a client sends its history as items or names
it by an id, so that its session is recognised either way; an item that is not supported is refused by its
place; errors never hold text of the conversation.

Instructions belong to one request: the next request of the dialogue has its own, or none. They are sent as the
first system message, with their text in a part, while a system message of the input is always a plain string
and, like all input, stays in the dialogue. Thus a stored transcript shows which of its messages were
instructions: these are dropped, and the request's own put in their place. The same instructions continue the
session; different ones change the prompt from its first word on, and begin a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from soma_vllm.api.responses.request import mistake, shown
from soma_vllm.sessions.state.transcript import text_of
from soma_vllm.types import Message


def messages_of(given: str | Sequence[Mapping[str, Any]], name: str = "input") -> list[Message]:
    """The `input` of a request, or what else has this name in it, as chat messages; at least one.

    An answer of several items is one message, as it is stored. Reasoning is left out, as chat clients do.

    Raises:
        BadRequest: an item is wrong, or of an unsupported kind; names it.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        where = f"{name}[{index}]"
        kind = item.get("type") or ("message" if "role" in item else None)
        add = _ITEMS.get(kind) if isinstance(kind, str) else None
        if add is None:
            raise mistake(f"{where}.type", shown(kind), f"one of {', '.join(_ITEMS)}")
        add(item, where, messages)
    if not messages:
        raise mistake(name, "no message", "at least one")
    return list(messages)


def prompt(instructions: str | None, history: Sequence[Message], added: Sequence[Message]) -> list[Message]:
    """The messages to send: the request's own instructions, the dialogue so far, the new input."""
    if history and _is_instructions(history[0], instructions):
        history = history[1:]
    return [*([_as_instructions(instructions)] if instructions else []), *history, *added]


def _add_message(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise mistake(f"{where}.role", shown(role), "one of user, assistant, system, developer")
    content = _content(item.get("content"), f"{where}.content", images=role == "user")
    last = messages[-1] if messages else {}
    if role == "assistant" and last.get("role") == "assistant" and last["content"] is None:
        last["content"] = content
        return
    # Few chat templates have a developer role; those that have treat it as the system role.
    messages.append({"role": "system" if role == "developer" else role, "content": content})


def _add_call(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    function = {name: _string(item, name, where) for name in ("name", "arguments")}
    call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _add_result(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    call = _string(item, "call_id", where)
    content = _content(item.get("output"), f"{where}.output", images=True)
    messages.append({"role": "tool", "tool_call_id": call, "content": content})


def _leave_out(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    return


_ITEMS: Mapping[str, Callable[[Mapping[str, Any], str, list[dict[str, Any]]], None]] = {
    "message": _add_message,
    "function_call": _add_call,
    "function_call_output": _add_result,
    "reasoning": _leave_out,
}

_TEXTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of a part -> the field with its text."""


def _content(content: object, where: str, images: bool) -> str | list[dict[str, Any]]:
    """Text as one string; parts only where there is more than text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise mistake(where, type(content).__name__, "text or a list of parts")
    parts = [_part(part, f"{where}[{index}]", images) for index, part in enumerate(content)]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(part: object, where: str, images: bool) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise mistake(where, type(part).__name__, "an object")
    kind = part.get("type")
    if kind == "input_image" and images:
        return _image(part, where)
    if not isinstance(kind, str) or kind not in _TEXTS:
        served = ", ".join([*_TEXTS, "input_image"] if images else _TEXTS)
        raise mistake(f"{where}.type", shown(kind), f"one of {served}")
    return {"type": "text", "text": _string(part, _TEXTS[kind], where)}


def _image(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    if part.get("file_id") is not None:
        raise mistake(f"{where}.file_id", "a file", "image_url, because files are not stored")
    image = {"url": _string(part, "image_url", where)}
    detail = part.get("detail") or "auto"
    if detail not in ("auto", "low", "high"):
        raise mistake(f"{where}.detail", shown(detail), "auto, low or high")
    # The default is left out: a history with it equals one without.
    return {"type": "image_url", "image_url": image | ({} if detail == "auto" else {"detail": detail})}


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise mistake(f"{where}.{name}", "nothing" if value is None else type(value).__name__, "text")
    return value


def _as_instructions(text: str) -> Message:
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def _is_instructions(message: Message, instructions: str | None) -> bool:
    """Whether a transcript's first message was instructions, or is a system message of the same text."""
    text = text_of(message)
    return message == _as_instructions(text) or (message.get("role") == "system" and text == instructions)
