"""What the session store takes and gives, beside events: plain values, free of SQLAlchemy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Event, SessionKey


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

    @classmethod
    def of(cls, session: Session) -> Self:
        """The row of a session as it is now."""
        adapter = None if session.adapter is None else session.adapter.name
        return cls(session.family, session.phase, session.prefix_digest(), len(session.turns), adapter)


@dataclass(frozen=True)
class TurnMark:
    """One turn, by which a later request's history is recognised."""

    seq: int
    """Of the event that recorded it."""
    number: int
    """1-based place in its session."""
    chain: str
    response: str | None
    """Id under which a client may name it."""
    link: str | None = None
    """Digest of its last exchange alone."""


@dataclass(frozen=True)
class AdapterRecord:
    """One adapter as the record has it."""

    name: str
    number: int
    path: str
    state: str


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
        return sum(_characters(event.text) for event in self.events)


@dataclass(frozen=True)
class TurnLocation:
    """A turn on record."""

    session: str
    seq: int
    number: int


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


def _characters(value: object) -> int:
    """Characters of all strings in a JSON value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, list | tuple) else 0
