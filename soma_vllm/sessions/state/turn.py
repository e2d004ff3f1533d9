"""One answered turn, and the event that records it.

Guarantees: `turn_of` gives back what `turn_event` was given, but for what audits found later; a turn whose text
was erased still says whether it could be learned from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from soma_vllm.sessions.state.events import Audited, EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.transcript import text_of
from soma_vllm.types import Event, Length, Message, Role, Usage

PROMPT_FIELDS = ("tools", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort")
"""What a chat template is given beside the messages."""


def prompt_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat request that shape its prompt, its messages apart."""
    return {name: body[name] for name in PROMPT_FIELDS if body.get(name)}


@dataclass(frozen=True)
class Turn:
    """One answered turn."""

    number: int
    """1-based."""
    messages: tuple[Message, ...]
    """What the client added since the last answer: the query, and on turn 1 whatever came before it."""
    answer: str
    engine: Role
    adapter: str | None
    phase: Phase
    """The phase in which it was routed."""
    reason: str
    usage: Usage
    ttft_s: float | None
    latency_s: float
    gap: float | None = None
    """Filled by the audit of this turn, where there was one that generated."""
    surprise: float | None = None
    """Filled by the audit of this turn, where there was one that only read: nats per token."""
    most_tokens: int | None = None
    """The longest answer that the client wanted; None where it did not say."""
    complete: bool = True
    """False when generation was cut off: such a turn is neither learned from nor judged on."""
    calls: tuple[Mapping[str, Any], ...] = ()
    """Calls of tools in the answer, as OpenAI's `tool_calls`."""
    chain: str = ""
    """Digest of the transcript up to and including this answer (`sessions/state/transcript.py`)."""
    asked: str = ""
    """Digest of the request that it answered: a request of the same digest is the same one, repeated."""
    links: tuple[str, ...] = ()
    """Digests of the exchanges that it added, its own last: more than one where the client's history had some
    that are not on record."""
    left_out: tuple[int, int] | None = None
    """Earlier turns that the client's history lacked, as the bounds of a slice: it had dropped them."""
    response: str | None = None
    """Id under which a client may name it (OpenAI's Responses API)."""
    stored: bool = True
    """False where its request said `store: false`: what was said is kept nowhere, and never teaches."""
    kept: bool = True
    """False where `messages`, `answer` and `calls` were erased, or never kept, and are empty."""
    skip: str | None = None
    """What `unteachable` said while the text was there, or why the surrogate cannot read it; filled by the
    record."""
    fields: Mapping[str, Any] = field(default_factory=dict)
    """What its request had beside messages that shapes the prompt, such as `tools`."""

    @property
    def length(self) -> Length:
        """How long the answer is, and might have been."""
        return Length(self.usage.completion_tokens, self.most_tokens)

    def teaches(self) -> bool:
        """Whether this is a whole answer of the original to a query of the user's."""
        return self.unteachable() is None

    def unteachable(self) -> str | None:
        """Why this turn cannot be learned from or judged on; None where it can."""
        if not self.stored:
            return "its request says store: false"
        if self.skip is not None or not self.kept:
            return self.skip
        if not self.messages or self.messages[-1].get("role") != "user":
            return "it does not answer a query of the user's"
        if self.engine is not Role.ORIGINAL:
            return "the original did not answer it"
        if not self.complete:
            return "its answer was cut off"
        if self.calls:
            return "its answer calls a tool"
        return None if self.answer.strip() else "its answer is empty"

    def audited(self, found: Audited) -> Turn:
        """The same turn with what its audit found."""
        return replace(self, gap=found.value) if found.kind == "gap" else replace(self, surprise=found.value)

    def silent(self) -> Turn:
        """The same turn without its text."""
        return replace(self, messages=(), answer="", calls=(), fields={}, kept=False, skip=self.unteachable())

    def voiced(self, messages: Sequence[Message]) -> Turn:
        """The same turn with its text as a client sent it back: the messages that were new, then the answer."""
        *added, said = messages
        calls = tuple(said.get("tool_calls") or ())
        return replace(self, messages=tuple(added), answer=text_of(said), calls=calls, kept=True)


def turn_event(turn: Turn, builds_on: int, at: float, kind: str = EventKind.TURN) -> Event:
    """The event of an answered turn. `builds_on` is how many recorded turns the client's history repeated.

    Kind "variant" records an answer that was given too, beside the one that counts (OpenAI's `n`).
    """
    data = asdict(turn) | {"builds_on": builds_on, "skip": turn.unteachable()}
    text = {name: data.pop(name) for name in ("messages", "answer", "calls", "fields")}
    for later in ("gap", "surprise", "kept"):
        del data[later]
    text["messages"] = [dict(message) for message in turn.messages]
    text["calls"] = [dict(call) for call in turn.calls]
    if not text["fields"]:
        del text["fields"]
    return Event(kind, at, data, text if turn.kept else None)


def turn_of(data: Mapping[str, Any], text: Mapping[str, Any] | None) -> Turn:
    """The turn that an event records, from the event's data and text."""
    said = text or {"messages": (), "answer": "", "calls": ()}
    return Turn(
        number=data["number"],
        messages=tuple(said["messages"]),
        answer=said["answer"],
        engine=Role(data["engine"]),
        adapter=data["adapter"],
        phase=Phase(data["phase"]),
        reason=data["reason"],
        usage=Usage(**data["usage"]),
        ttft_s=data["ttft_s"],
        latency_s=data["latency_s"],
        most_tokens=data.get("most_tokens"),
        complete=data["complete"],
        calls=tuple(said["calls"]),
        chain=data["chain"],
        asked=data["asked"],
        links=tuple(data.get("links") or ()),
        left_out=None if data.get("left_out") is None else tuple(data["left_out"]),
        response=data["response"],
        stored=data.get("stored", True),
        kept=text is not None,
        skip=data["skip"],
        fields=said.get("fields") or {},
    )
