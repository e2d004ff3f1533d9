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
from soma_vllm.sessions.state.transcript import query_of, text_of
from soma_vllm.types import Event, Length, Message, Role, Usage

PROMPT_FIELDS = ("tools", "documents", "chat_template", "chat_template_kwargs", "reasoning_effort")
"""What a chat template is given beside the messages."""
CALL_FIELDS = ("tool_choice", "parallel_tool_calls")
"""What a request with tools says of calling them."""


def prompt_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat request that shape its prompt, its messages apart, and whether tools are called."""
    said = {name: body[name] for name in PROMPT_FIELDS if body.get(name)}
    calling = CALL_FIELDS if "tools" in said else ()
    return said | {name: body[name] for name in calling if body.get(name) is not None}


@dataclass(frozen=True, slots=True)  # with a dict of its own each would take a kilobyte more
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
    said: str = ""
    """The answer's `AnswerPrint`, as text; "" in records of version 0.1."""
    query: str = ""
    """Digest of the query alone; "" in records of version 0.1."""
    guard: str | None = None
    """`TranscriptDigest.guard` of the request's system messages; None in records of version 0.1."""
    begun: bool = False
    """The client gave the beginning of the answer."""
    head: tuple[Message, ...] | None = None
    """The system messages that the request began with, where they were not those of the turn before."""
    later: tuple[Message, ...] | None = None
    """`messages` as the client sent them in later requests, where it has changed them since."""

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
        if query_of(self.messages).get("role") != "user":
            return "it does not answer a query of the user's"
        if self.engine is not Role.ORIGINAL:
            return "the original did not answer it"
        if not self.complete:
            return "its answer was cut off"
        if self.begun:
            return "the client began its answer"
        if self.calls:
            return "its answer calls a tool"
        return None if self.answer.strip() else "its answer is empty"

    def audited(self, found: Audited) -> Turn:
        """The same turn with what its audit found."""
        return replace(self, gap=found.value) if found.kind == "gap" else replace(self, surprise=found.value)

    def silent(self) -> Turn:
        """The same turn without its text."""
        return replace(self, **_SILENT, kept=False, skip=self.unteachable())

    def reworded(self, chain: str, link: str, later: Sequence[Message] | None) -> Turn:
        """The same turn, of which the client's history says something else now; None: the text was not kept."""
        links = (*self.links[:-1], link)
        return replace(self, chain=chain, links=links, later=None if later is None else tuple(later))

    def voiced(self, messages: Sequence[Message]) -> Turn:
        """The same turn with its text as a client sent it back: the messages that were new, then the answer."""
        *added, said = messages
        calls = tuple(said.get("tool_calls") or ())
        return replace(self, messages=tuple(added), answer=text_of(said), calls=calls, kept=True, later=None)


_ADDED: dict[str, Any] = {"stored": True, "said": "", "query": "", "guard": None, "begun": False}
"""Fields that version 0.1 did not record, with what they are then."""
_SILENT: dict[str, Any] = {
    "messages": (),
    "answer": "",
    "calls": (),
    "fields": {},
    "head": None,
    "later": None,
}


def turn_event(
    turn: Turn, builds_on: int, at: float, kind: str = EventKind.TURN, shared: bool = False
) -> Event:
    """The event of an answered turn. `builds_on` is how many recorded turns the client's history repeated.

    Kind "variant" records an answer beside the one that counts. `shared`: to the same request (OpenAI's `n`);
    what it answers stands in the turn's own event.
    """
    data = asdict(turn) | {"builds_on": builds_on, "skip": turn.unteachable()}
    for apart in (*_SILENT, "gap", "surprise", "kept"):
        del data[apart]
    for name, default in _ADDED.items():
        if data[name] == default:
            del data[name]
    text: dict[str, Any] = {
        "messages": [] if shared else list(map(dict, turn.messages)),
        "answer": turn.answer,
        "calls": list(map(dict, turn.calls)),
    }
    if turn.fields and not shared:
        text["fields"] = dict(turn.fields)
    for name, messages in (("head", turn.head), ("later", turn.later)):
        if messages is not None:
            text[name] = list(map(dict, messages))
    return Event(kind, at, data, text if turn.kept else None)


def turn_of(data: Mapping[str, Any], text: Mapping[str, Any] | None) -> Turn:
    """The turn that an event records, from the event's data and text."""
    said = text or _SILENT
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
        kept=text is not None,
        skip=data["skip"],
        **{name: data.get(name, default) for name, default in _ADDED.items()},
        fields=said.get("fields") or {},
        head=_messages(said.get("head")),
        later=_messages(said.get("later")),
    )


def _messages(found: Sequence[Message] | None) -> tuple[Message, ...] | None:
    return None if found is None else tuple(found)
