"""What a dialogue's messages mean to a session: equality, fingerprints, and where a history leaves the record.

Clients send the whole history with every request and re-serialise it freely, so messages are compared by what
they say: role, text, attachments. Everything else about them is the engines' business.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

from soma_vllm.types import Message


class Served(Protocol):
    """A turn on record, as far as comparison needs it."""

    @property
    def messages(self) -> tuple[Message, ...]: ...
    @property
    def answer(self) -> str: ...


def text_of(message: Message) -> str:
    """The plain text of a message; parts that are not text count by their kind."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = (part if isinstance(part, dict) else {"text": str(part)} for part in content)
    return "\n".join(str(part.get("text", f"[{part.get('type', 'part')}]")) for part in parts)


def says(message: Message) -> tuple[str, str, str]:
    """What a message says, comparable: (role, text, everything else that carries meaning)."""
    if message.get("role") == "assistant":
        # Answers are on record as text; what else they held (tool calls) cannot be compared.
        return "assistant", text_of(message).strip(), ""
    content: Any = message.get("content")
    attachments = [p for p in content if not _is_text(p)] if isinstance(content, list) else []
    rest = {
        "attachments": attachments,
        "tool_call_id": message.get("tool_call_id"),
        "name": message.get("name"),
    }
    return str(message.get("role")), text_of(message).strip(), json.dumps(rest, sort_keys=True, default=str)


def fingerprint(messages: Sequence[Message]) -> str:
    """Digest of what a list of messages says: the key by which a transcript is recognised."""
    digest = hashlib.sha256()
    for message in messages:
        digest.update(json.dumps(says(message)).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()


def answered(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The part of a request's history up to and including its last assistant message; empty on a first turn."""
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].get("role") == "assistant":
            return tuple(messages[: index + 1])
    return ()


def common_turns(turns: Sequence[Served], messages: Sequence[Message]) -> tuple[int, tuple[Message, ...]]:
    """How many recorded turns a request's history repeats, and the messages that follow them.

    A turn counts as repeated only when its messages *and* its answer are there, so the request that is being
    answered now is always part of the remainder.
    """
    position = 0
    for count, turn in enumerate(turns):
        end = position + len(turn.messages)
        reply = messages[end] if end < len(messages) else None
        same = (
            reply is not None
            and [says(m) for m in messages[position:end]] == [says(m) for m in turn.messages]
            and reply.get("role") == "assistant"
            and text_of(reply).strip() == turn.answer.strip()
        )
        if not same:
            return count, tuple(messages[position:])
        position = end + 1
    return len(turns), tuple(messages[position:])


def _is_text(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")
