"""The nouns that rooms hand to each other: frozen, picklable, free of heavy imports.

A noun that only one room uses lives in that room. Fields that are filled later say by whom.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Message = Mapping[str, Any]
"""One OpenAI chat message, as the client sent it."""

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MANIFEST = "soma.json"
"""The files of an adapter: the first two as peft and vLLM name them, the third of our own."""


class Role(StrEnum):
    """The two models of a pair. Also the value of the `X-SOMA-Engine` header."""

    ORIGINAL = "original"
    SURROGATE = "surrogate"


class Candidate(StrEnum):
    """Who may serve a session after its warm start, cheapest first."""

    PLAIN = "plain"
    """The surrogate without an adapter."""
    ADAPTER = "adapter"
    """The surrogate with the session's own adapter."""
    ORIGINAL = "original"
    """The original keeps the session."""


@dataclass(frozen=True)
class SessionKey:
    """A session's full name. Nothing is ever looked up by `session` alone."""

    tenant: str
    """Digest of the API key, or "public" without one."""
    session: str
    """Id the client chose, or the one derived from the transcript."""


@dataclass(frozen=True)
class AdapterRef:
    """A published adapter as an engine needs it: vLLM's name, integer id and path."""

    name: str
    """Never reused: vLLM's prefix cache keys on it."""
    number: int
    """vLLM's lora_int_id: allocated by the store, at least 1, never reused."""
    path: str
    """Directory with adapter_config.json and adapter_model.safetensors."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """The original's own distribution over an answer it gave, token by token, in the original's vocabulary."""

    tokens: tuple[int, ...]
    """(n,) ids of the answer as generated, up to its last whole character, with the end of turn where it was
    generated."""
    top: NDArray[np.int32]
    """(n, k) ids of the likeliest tokens at each position, likeliest first; -1 pads a shorter row."""
    logprobs: NDArray[np.float32]
    """(n, k) their log-probabilities, nats; -inf at padding."""


@dataclass(frozen=True)
class Length:
    """How long an answer is, and might have been."""

    tokens: int | None = None
    """As the engine counted that gave it; None where it did not say."""
    most: int | None = None
    """The client's own limit, tokens; None without one."""


@dataclass(frozen=True)
class Example:
    """One turn to learn from or to be judged on."""

    turn: int
    """1-based index of the turn in its session."""
    messages: tuple[Message, ...]
    """The prompt the surrogate will be given, ending with the user's query."""
    answer: str
    """What the original answered."""
    teacher: Teacher | None = None
    """Its distribution over that answer; None where the original returns text alone."""
    length: Length = Length()
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What its request had beside messages that shapes the prompt, such as `tools`."""
    prompt: tuple[int, ...] | None = None
    """The prompt's token ids, as the surrogate's engine reads them; None: the trainer renders it."""

    @property
    def body(self) -> dict[str, Any]:
        """The chat request that the surrogate will be given."""
        return chat_body(self.messages, self.fields)


def chat_body(messages: Sequence[Message], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request for an answer in words: tools are described to the model, and not called."""
    words = {"tool_choice": "none"} if fields.get("tools") else {}
    return {"messages": list(messages), **fields, **words}


@dataclass(frozen=True)
class Agreement:
    """Teacher-forced agreement of one candidate with the original's answers, over all held-out tokens."""

    nll: float
    """Mean negative log-likelihood per answer token, nats."""
    top1: float
    """Share of answer tokens that are the candidate's own first choice, in [0, 1]."""
    tokens: int
    """Answer tokens scored; 0 where no turn was held out, and then the others are NaN."""


@dataclass(frozen=True)
class Signature:
    """What an adapter does to one fixed text, which belongs to no conversation: how likely the surrogate finds
    its tokens without and with the adapter. Tells whether an engine serves the adapter as it was trained."""

    tokens: tuple[int, ...]
    """(n,) ids of the text."""
    plain: tuple[float, ...]
    """(n - 1,) log-probability of each token but the first under the plain surrogate, nats."""
    adapted: tuple[float, ...]
    """(n - 1,) the same under the adapter."""


@dataclass(frozen=True)
class Gap:
    """How far two answers to one query are apart, as a judge finds them."""

    value: float
    """0: the same; a pair passes the gate's threshold or does not. In [0, 2]."""
    why: tuple[str, ...] = ()
    """Which facts differ, in words. It may quote the answers: never logged, never part of an event."""
    failure: str | None = None
    """Why the judge could not judge the pair, which then does not pass; it quotes nothing."""


@dataclass(frozen=True)
class Evidence:
    """What the gate knows of one candidate on turns the candidate was not trained on."""

    candidate: Candidate
    gaps: tuple[float, ...]
    """Gap of each held-out turn, in the order of `turns`."""
    turns: tuple[int, ...]
    agreement: Agreement | None
    """None where no teacher-forced score was taken."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one reply, as the engine counted them; None where it did not say."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


class ReasonCode(StrEnum):
    """Why an engine answers a turn, for code to decide by."""

    WARM_START = "warm_start"
    PHASE = "phase"
    """The session is in a phase in which the original answers."""
    OTHER_POLICY = "other_policy"
    """The session was adapted under another policy's rules."""
    TOOLS = "tools"
    """The surrogate may have no turns with tools."""
    TOOLS_UNCHECKED = "tools_unchecked"
    """Its calls of these tools were not found to be the original's in the warm start."""
    PREAMBLE = "preamble"
    """The request stands under other system messages than were learned under."""
    LOCALITY = "locality"
    """The query is too far from the warm start."""
    SWITCHED = "switched"
    PINNED = "pinned"
    TOOL_RESULT = "tool_result"
    UNPREPARED = "unprepared"
    """The policy could not decide."""
    MALFORMED_CALL = "malformed_call"
    """The surrogate called a tool as the request does not allow."""
    SURROGATE_FAILED = "surrogate_failed"
    ORIGINAL_UNAVAILABLE = "original_unavailable"
    OTHER = "other"
    """A policy's own reason."""


class Reason(str):
    """Why an engine answers a turn: one word or a short phrase with the number it rests on, and its code."""

    code: ReasonCode

    def __new__(cls, text: str, code: ReasonCode = ReasonCode.OTHER) -> Self:
        """A reason of this text."""
        reason = super().__new__(cls, text)
        reason.code = code
        return reason


@dataclass(frozen=True)
class Route:
    """A policy's decision for one turn."""

    engine: Role
    adapter: AdapterRef | None
    messages: tuple[Message, ...]
    """The prompt to send: the client's messages, or a compressed prefix of them."""
    reason: str
    """For `X-SOMA-Reason` and the event log: a `Reason`, or its text alone."""

    @property
    def code(self) -> ReasonCode:
        """The code of the reason; OTHER for a text alone."""
        return self.reason.code if isinstance(self.reason, Reason) else ReasonCode.OTHER


@dataclass(frozen=True)
class Event:
    """Something that happened to a session, with the numbers the decision rests on."""

    kind: str
    at: float
    """Unix time, seconds."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """JSON-compatible: numbers, names, digests. Never conversation text."""
    text: Mapping[str, Any] | None = None
    """JSON-compatible: conversation text. Kept apart, so that it can be erased while the event stays."""
