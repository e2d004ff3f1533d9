"""What a dialogue's messages mean to a session: equality, digests, and where a history leaves the record.

Clients send the whole history with every request and re-serialise it freely, so messages are compared by what
they say: role, text, calls of tools, attachments. Everything else about them is the engines' business.

A *chain* is the digest of a whole transcript up to and including an answer, salted with its tenant: equal
chains are equal transcripts, so a history is found on record, and told from another, after its text was erased.
A *link* is the digest of one exchange alone: an answer and what was said since the answer before it, salted
with the tenant and the system messages that begin the dialogue. By its links a history is recognised from which
the client dropped the oldest turns, to fit a context window (`sessions/state/truncated_history.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soma_vllm.types import Message

LINK_HALF = 16
"""Hexadecimal digits: 64 bits tell the exchanges of one dialogue apart."""


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
        return "assistant", text_of(message).strip(), _as_json(calls_of(message))
    content: Any = message.get("content")
    attachments = [p for p in content if not _is_text(p)] if isinstance(content, list) else []
    rest = {
        "attachments": attachments,
        "tool_call_id": message.get("tool_call_id"),
        "name": message.get("name"),
    }
    return str(message.get("role")), text_of(message).strip(), _as_json(rest)


def calls_of(message: Message) -> list[list[Any]]:
    """The calls of tools in an assistant's message: [name, arguments], arguments as the JSON they mean."""
    found = message.get("tool_calls")
    calls = found if isinstance(found, list | tuple) else ()
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    return [[f.get("name"), _meant(f.get("arguments"))] for f in functions if isinstance(f, dict)]


@dataclass(frozen=True)
class AnswerMark:
    """The end of an answer in a history."""

    end: int
    """Index of the message after it."""
    chain: str
    link: str
    """Half of it for what was said before the answer, half for the answer."""


@dataclass(frozen=True)
class TranscriptDigest:
    """A transcript's messages, each digested once."""

    messages: tuple[Message, ...]
    asked: str
    """Digest of all messages."""
    marks: tuple[AnswerMark, ...]
    """One for each assistant message, first to last."""
    cut: bool
    """The history begins in the middle of an exchange, as one does that was cut to a number of messages."""
    _hashes: RunningHashes = field(compare=False, repr=False)

    def prefix_digests(self) -> list[str]:
        """Chains of the history, longest first: what a lookup tries."""
        return [mark.chain for mark in reversed(self.marks)]

    def followed_by(self, *messages: Message) -> TranscriptDigest:
        """The digest of this transcript with further messages; only these are read."""
        hashes = self._hashes.copy()
        cut, marks = self.cut, list(self.marks)
        for position, message in enumerate(messages, len(self.messages)):
            said = json.dumps(says(message)).encode("utf-8", "surrogatepass") + b"\n"
            role = message.get("role")
            if hashes.in_preamble and role not in PREAMBLE:
                hashes.in_preamble, cut = False, role == "assistant"
            hashes.whole.update(said)
            if hashes.in_preamble:
                hashes.preamble, hashes.exchange = hashes.whole.copy(), hashes.whole.copy()
            elif role == "assistant":
                answer = hashes.preamble.copy()
                answer.update(said)
                link = hashes.exchange.hexdigest()[:LINK_HALF] + answer.hexdigest()[:LINK_HALF]
                marks.append(AnswerMark(position + 1, hashes.whole.hexdigest(), link))
                hashes.exchange = hashes.preamble.copy()
            else:
                hashes.exchange.update(said)
        whole = (*self.messages, *messages)
        return TranscriptDigest(whole, hashes.whole.hexdigest(), tuple(marks), cut, hashes)


@dataclass
class RunningHashes:
    """Where the digests of a transcript stand, so that it can be continued."""

    whole: hashlib._Hash
    """Of everything so far."""
    preamble: hashlib._Hash
    """Of the tenant and the system messages that begin the transcript."""
    exchange: hashlib._Hash
    """Of the preamble and what was said since the last answer."""
    in_preamble: bool = True
    """Only system messages so far."""

    def copy(self) -> RunningHashes:
        """One that goes on apart from this one."""
        return RunningHashes(self.whole.copy(), self.preamble.copy(), self.exchange.copy(), self.in_preamble)


def read(tenant: str, messages: Sequence[Message]) -> TranscriptDigest:
    """Digest a request's messages."""
    salt = hashlib.sha256(f"{tenant}\n".encode())
    empty = TranscriptDigest((), salt.hexdigest(), (), False, RunningHashes(salt, salt.copy(), salt.copy()))
    return empty.followed_by(*messages)


PREAMBLE = ("system", "developer")
"""Roles of the messages that a dialogue begins with."""


def preamble(messages: Sequence[Message]) -> Sequence[Message]:
    """The system messages that a dialogue begins with."""
    count = 0
    while count < len(messages) and messages[count].get("role") in PREAMBLE:
        count += 1
    return messages[:count]


def spoken(answer: str, calls: Sequence[Mapping[str, Any]] = ()) -> Message:
    """An answer as the assistant message that a client would send back."""
    message: dict[str, Any] = {"role": "assistant", "content": answer}
    if calls:
        message["tool_calls"] = [dict(call) for call in calls]
        message["content"] = answer or None
    return message


def _meant(arguments: object) -> object:
    """A call's arguments, whatever the spacing they came in."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _is_text(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")
