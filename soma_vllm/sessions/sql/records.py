"""What the session store takes and gives, beside events: plain values, free of SQLAlchemy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from soma_vllm.sessions.state.session import Session
from soma_vllm.types import AdapterRef, Event, SessionKey

FACTS = ("version", "base_model", "rank", "size_bytes", "created")
"""What is known of an adapter from its publication on."""


@dataclass(frozen=True)
class SessionSnapshot:
    """Where a session stands after an append: its row."""

    family: str
    """Shared by all branches of one dialogue."""
    phase: str
    chain: str
    """Digest of the transcript so far; "" before the first turn."""
    turns: int
    adapter: str | None
    """Name of the adapter that serves it."""
    ending: str = ""
    """Digest of the last answer's words; "" before the first turn."""

    @classmethod
    def of(cls, session: Session) -> Self:
        """The row of a session as it is now."""
        adapter = None if session.adapter is None else session.adapter.name
        chain, ending = session.prefix_digest(), session.ending()
        return cls(session.family, session.phase, chain, len(session.turns), adapter, ending)


@dataclass(frozen=True)
class TurnMark:
    """One turn, by which a later request's history is recognised."""

    seq: int
    """Of the event that recorded it."""
    number: int
    """1-based place in its session."""
    chain: str
    response: str | None = None
    """Id under which a client may name it."""


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter as the record has it. What follows `state` is None where it is not on record yet, and written
    where it stays as it is."""

    key: SessionKey
    """The session that moved it last."""
    name: str
    number: int
    path: str
    state: str
    version: int | None = None
    """Grows with every publication of the session, from 1."""
    base_model: str | None = None
    rank: int | None = None
    size_bytes: int | None = None
    created: float | None = None
    """Unix time, seconds."""

    @classmethod
    def moved(cls, key: SessionKey, ref: AdapterRef, state: str, facts: Mapping[str, Any]) -> Self:
        """An adapter in a new state, with what `facts` say of it."""
        known = {name: facts[name] for name in FACTS if name in facts}
        return cls(key, ref.name, ref.number, ref.path, state, **known)

    @property
    def ref(self) -> AdapterRef:
        """As an engine needs it."""
        return AdapterRef(self.name, self.number, self.path)

    def columns(self) -> dict[str, Any]:
        """Its row."""
        named = ("name", "number", "path", "state", *FACTS)
        return vars(self.key) | {name: getattr(self, name) for name in named}


@dataclass(frozen=True)
class Append:
    """Events of one session for its log, and where the session stands after them."""

    key: SessionKey
    first_seq: int
    """Sequence number of the first event."""
    events: Sequence[Event]
    snapshot: SessionSnapshot
    marks: Sequence[TurnMark] = ()
    """Turns of these events."""
    adapters: Sequence[AdapterRecord] = ()
    """They replace what was on record under their names: the session that appended an adapter last owns it."""

    @cached_property
    def size(self) -> int:
        """Characters of what was said in these events, which is nearly all of their memory."""
        return sum(characters(event.text) for event in self.events)


@dataclass(frozen=True)
class TurnLocation:
    """A turn on record."""

    session: str
    seq: int
    number: int


@dataclass(frozen=True)
class TurnHit:
    """A turn whose transcript is a beginning of a request's history."""

    found: TurnLocation
    chain: str
    stands: bool
    """Its session has not gone on from it."""

    @property
    def root(self) -> str:
        """The id of the session that its dialogue began with, for one that is known by its transcript."""
        return self.found.session.partition("~")[0]


@dataclass(frozen=True)
class Summary:
    """One row of a listing."""

    key: SessionKey
    family: str
    phase: str
    turns: int
    adapter: str | None
    updated_at: float
    """Unix time, seconds."""


@dataclass(frozen=True)
class LengthCount:
    """How many dialogues of a tenant have so many turns, or have gone on to so many; branches of one dialogue
    count once, by the longest."""

    tenant: str
    turns: int
    over: bool
    """Whether they have been silent for long."""
    sessions: int


def characters(value: object) -> int:
    """Characters of all strings in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(characters, value.values()))
    return sum(map(characters, value)) if isinstance(value, list | tuple) else 0
