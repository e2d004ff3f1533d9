"""What a dialogue's messages mean to a session: equality, digests, and where a history leaves the record.

Clients send the whole history with every request and re-serialise it freely, so messages are compared by what
they say: role, text, calls of tools, attachments; answers by their words (`sessions/state/answer_print.py`).
Everything else about them is the engines' business. The system and developer messages that a request begins
with are its own, and no part of the dialogue: they are in no digest but the *guard*, which tells whether a
request stands under the same ones but for times and numbers.

A *chain* is the digest of a whole transcript up to and including an answer, salted with its tenant: equal
chains are equal transcripts, so a history is found on record, and told from another, after its text was erased.
A *link* is the digest of one exchange alone: an answer and what was said since the answer before it, salted
with the tenant. By its links a history is recognised from which the client dropped the oldest turns, to fit a
context window (`sessions/state/truncated_history.py`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from soma_vllm.sessions.state.answer_print import HeardAnswer, as_json, calls_of, spoken, text_of
from soma_vllm.types import Message

__all__ = [
    "AnswerMark",
    "TranscriptDigest",
    "calls_of",
    "preamble",
    "query_of",
    "read",
    "says",
    "spoken",
    "text_of",
]

LINK_HALF = 16
"""Hexadecimal digits: 64 bits tell the exchanges of one dialogue apart."""

PREAMBLE = ("system", "developer")
"""Roles of the messages that a request may begin with."""

_DATED = re.compile(
    r"\d+|\b(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?\b|\b[ap]\.?m\b"
    r"|\b(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t(?:ember)?)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b",
    re.IGNORECASE,
)
"""What a clock changes in a text."""


def says(message: Message) -> tuple[str, str, str]:
    """What a message of anybody but the assistant says, comparable: (role, text, what else carries meaning)."""
    content: Any = message.get("content")
    attachments = [p for p in content if not _is_text(p)] if isinstance(content, list) else []
    rest = {"attachments": attachments, "tool_call_id": message.get("tool_call_id")}
    return str(message.get("role")), text_of(message).strip(), as_json(rest)


@dataclass(frozen=True)
class AnswerMark:
    """The end of an answer in a history."""

    end: int
    """Index of the message after it."""
    chain: str
    link: str
    """Half of it for what was said before the answer, half for the answer."""
    answer: str
    """The answer's `AnswerPrint`, as text."""


@dataclass(frozen=True)
class TranscriptDigest:
    """A transcript's messages, each digested once."""

    messages: tuple[Message, ...]
    salt: str
    """The tenant."""
    asked: str
    """Digest of all messages but the preamble."""
    marks: tuple[AnswerMark, ...]
    """One for each assistant message, first to last."""
    cut: bool
    """The history begins in the middle of an exchange, as one does that was cut to a number of messages."""
    head: int
    """Messages of the preamble."""
    query: str
    """Digest of the last message that is no system message, without its place."""
    _hashes: RunningHashes = field(compare=False, repr=False)

    def prefix_digests(self) -> list[str]:
        """Chains of the history, longest first: what a lookup tries."""
        return [mark.chain for mark in reversed(self.marks)]

    def heard(self, mark: AnswerMark) -> HeardAnswer:
        """The answer that a mark ends."""
        return HeardAnswer(self.salt, self.messages[mark.end - 1])

    @property
    def preamble(self) -> tuple[Message, ...]:
        """The system messages that the request begins with."""
        return self.messages[: self.head]

    @property
    def guard(self) -> str:
        """Digest of the preamble without times and numbers; "" without one."""
        texts = [_DATED.sub("", text_of(message)) for message in self.preamble]
        said = "\n".join(" ".join(text.split()) for text in texts)
        return _hexdigest(f"{self.salt}\n{said}".encode("utf-8", "surrogatepass"))[:16] if said else ""

    def followed_by(self, *messages: Message) -> TranscriptDigest:
        """The digest of this transcript with further messages; only these are read."""
        hashes = self._hashes.copy()
        cut, marks, head, query = self.cut, list(self.marks), self.head, self.query
        for position, message in enumerate(messages, len(self.messages)):
            role = message.get("role")
            if head == position and role in PREAMBLE:
                head += 1
                continue
            if head == position:
                cut = role == "assistant"
            if role == "assistant":
                heard = HeardAnswer(self.salt, message)
                answer = str(heard.print)
                hashes.whole.update(f"{answer}\n".encode())
                said = _hexdigest(f"{self.salt}\n{answer}".encode())[:LINK_HALF]
                link = hashes.exchange.hexdigest()[:LINK_HALF] + said
                marks.append(AnswerMark(position + 1, hashes.whole.hexdigest(), link, answer))
                hashes.exchange = hashes.empty.copy()
            else:
                line = json.dumps(says(message)).encode("utf-8", "surrogatepass") + b"\n"
                hashes.whole.update(line)
                hashes.exchange.update(line)
                if role not in PREAMBLE:
                    query = _hexdigest(self.salt.encode("utf-8", "surrogatepass") + line)[:LINK_HALF]
        whole = (*self.messages, *messages)
        asked = hashes.whole.hexdigest()
        return TranscriptDigest(whole, self.salt, asked, tuple(marks), cut, head, query, hashes)


@dataclass
class RunningHashes:
    """Where the digests of a transcript stand, so that it can be continued."""

    empty: hashlib._Hash
    """Of the tenant."""
    whole: hashlib._Hash
    """Of everything so far."""
    exchange: hashlib._Hash
    """Of what was said since the last answer."""

    def copy(self) -> RunningHashes:
        """One that goes on apart from this one."""
        return RunningHashes(self.empty, self.whole.copy(), self.exchange.copy())


def read(tenant: str, messages: Sequence[Message]) -> TranscriptDigest:
    """Digest a request's messages."""
    salt = hashlib.sha256(f"{tenant}\n".encode())
    hashes = RunningHashes(salt, salt.copy(), salt.copy())
    return TranscriptDigest((), tenant, salt.hexdigest(), (), False, 0, "", hashes).followed_by(*messages)


def preamble(messages: Sequence[Message]) -> Sequence[Message]:
    """The system messages that a request begins with."""
    count = 0
    while count < len(messages) and messages[count].get("role") in PREAMBLE:
        count += 1
    return messages[:count]


def query_of(messages: Sequence[Message]) -> Message:
    """The last message that is no system message, such as a reminder after a question; {} without one."""
    return next((message for message in reversed(messages) if message.get("role") not in PREAMBLE), {})


def _is_text(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and part.get("type") == "text")


def _hexdigest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
