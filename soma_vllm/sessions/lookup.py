"""Which session a request continues: the one it names, one that its transcript tells, a branch, or a new one.

Guarantees: nothing is found outside its tenant; a request whose history diverges from the stored transcript
continues in a new branch, so that no request overwrites another one's turn; without an id a shortened history
is recognised only where a single session ends with what is left of it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from soma_vllm.errors import NotFound, Unprocessable
from soma_vllm.sessions.ports import in_time
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.records import TurnLocation
from soma_vllm.sessions.state.adapter_states import AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.fold import branch_event, inheritance
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import RECOGNISED, Session
from soma_vllm.sessions.state.transcript import TranscriptDigest
from soma_vllm.sessions.state.turn import Turn, turn_of
from soma_vllm.types import Message, SessionKey

SURE_EXCHANGES = 2
"""Whole exchanges that must be left of a history without an id for its session to be recognised by them."""

MOST_ALIKE = 5
"""Sessions that end alike, above which none of them is recognised without an id."""


@dataclass(frozen=True)
class StoredTranscript:
    """A transcript up to an answer that a client names."""

    session: str
    messages: tuple[Message, ...]


class SessionLookup:
    """Finds sessions among the live ones and those on record. Has no state of its own."""

    def __init__(self, registry: SessionRegistry) -> None:
        self.registry = registry
        self._store = registry.store
        self._index = registry.index

    @asynccontextmanager
    async def begin(
        self, tenant: str, named: str | None, reading: TranscriptDigest
    ) -> AsyncIterator[SessionKey]:
        """The session that a request continues, which stays in memory inside the block; else as `place`."""
        key = await self.place(tenant, named, reading)
        try:
            yield key
        finally:
            self.registry.release(key)

    async def place(self, tenant: str, named: str | None, reading: TranscriptDigest) -> SessionKey:
        """The session that a request continues, open and held: the one it names, a branch of it, the one whose
        transcript it repeats, or a new one.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        self.registry.write_behind.require_room()
        found = None
        if named is None:
            found = await self._find(tenant, "", reading) or await self._find_trimmed(tenant, "", reading)
            named = f"{RECOGNISED}{uuid.uuid4().hex}" if found is None else found.session
        session = await self.registry.open(SessionKey(tenant, named))
        if not _leads_on(session, reading):
            session = await self._other(session, found, reading)
        self.registry.hold(session.key)
        return session.key

    def settle(self, key: SessionKey, reading: TranscriptDigest) -> SessionKey:
        """Where a request belongs once it is answered, held: its session, or a branch of it if that went on in
        between. Release it."""
        session = self.registry.session(key)
        if not session.continued_by(reading):
            count, _ = session.repeated(reading)
            key = self._branch(session, session.turns[:count]).key
        self.registry.hold(key)
        return key

    async def said(self, tenant: str, response: str) -> StoredTranscript:
        """The transcript up to the answer of this id.

        Raises:
            NotFound: this tenant has no such response.
            Unprocessable: its text was not kept.
            StoreUnavailable: the session store did not answer within 3 s.
        """
        found = self._index.of_response(tenant, response)
        if found is None:
            found = await in_time(self._store.of_response(tenant, response))
        if found is None:
            raise NotFound(f"no response {response!r}")
        session = await self.registry.open(SessionKey(tenant, found.session))
        turns = self._turns_at(session, found.seq)
        return StoredTranscript(found.session, _transcript(replace(session, turns=turns), response))

    async def conversation(self, tenant: str, name: str) -> tuple[Message, ...]:
        """The transcript of a session so far; empty for a new one. Raises as `said` does."""
        async with self.registry.lease(SessionKey(tenant, name)) as session:
            return _transcript(session, name)

    async def _other(self, session: Session, found: TurnLocation | None, reading: TranscriptDigest) -> Session:
        """Where a request goes that does not continue the session it seemed to."""
        tenant, family = session.key.tenant, session.family
        again = self._index.asked_by(tenant, family, reading.asked) if reading.marks else None
        if again is not None and (asked := self.registry.session(again)).asked_again_by(reading):
            return asked
        if found is None:
            found = await self._find(tenant, family, reading)
        if found is None or found.number < len(reading.marks):
            found = await self._find_trimmed(tenant, family, reading) or found
        if found is None:
            return self._branch(session, session.turns[: session.overlap(reading).turns])
        other = await self.registry.open(SessionKey(tenant, found.session))
        return other if _leads_on(other, reading) else self._branch(other, self._turns_at(other, found.seq))

    def _branch(self, parent: Session, turns: Sequence[Turn]) -> Session:
        """A session that begins with some turns of another, in memory until its own first turn."""
        now = time.time()
        family, unique = parent.family, uuid.uuid4().hex
        name = f"{family}~{unique[:12]}" if family else f"{RECOGNISED}{unique}"
        inherited = inheritance(parent, turns, now) if self._may_inherit(parent) else None
        first = branch_event(parent, turns, now)
        pending = (first,) if inherited is None else (first, inherited)
        return self.registry.begin(SessionKey(parent.key.tenant, name), pending)

    def _may_inherit(self, parent: Session) -> bool:
        """Whether what serves a session may serve another one as well: not while its adapter leaves."""
        state = None if parent.adapter is None else self.registry.adapter_state(parent.adapter.name)
        return state not in (AdapterState.DRAINING, AdapterState.RETIRED)

    def _turns_at(self, session: Session, seq: int) -> tuple[Turn, ...]:
        """The turns of a session as one of its events left them."""
        past = self.registry.session_at(session.key, seq)
        last = self.registry.events(session.key)[seq]
        if last.kind != EventKind.VARIANT:
            return past.turns
        turn = turn_of(last.data, last.text)
        return (*past.turns[: turn.number - 1], turn)

    async def _find(self, tenant: str, family: str, reading: TranscriptDigest) -> TurnLocation | None:
        """The turn on record with which a request's history agrees furthest."""
        if not reading.marks:
            return None
        chains = reading.prefix_digests()
        hit = self._index.find(tenant, family, chains)
        if hit is not None and hit.exact and hit.found.number == len(reading.marks):
            return hit.found
        on_record = await in_time(self._store.find(tenant, family, chains))
        if hit is None or on_record is None:
            return on_record if hit is None else hit.found
        if hit.found.number > on_record.number or (hit.exact and hit.found.number == on_record.number):
            return hit.found
        return on_record

    async def _find_trimmed(self, tenant: str, family: str, reading: TranscriptDigest) -> TurnLocation | None:
        """The last turn of the session that a history goes on from whose oldest turns were dropped.

        Without a family only where two whole exchanges or more are left, which one session alone ends with:
        short ones are said in many dialogues.
        """
        whole = len(reading.marks) - reading.cut
        if whole < (1 if family else SURE_EXCHANGES):
            return None
        link = reading.marks[-1].link
        on_record = await in_time(self._store.standing(tenant, family, link, MOST_ALIKE))
        names = list(dict.fromkeys([*on_record, *self._index.ending_with(tenant, family, link)]))
        if len(names) >= MOST_ALIKE and not family:
            return None
        sessions = [await self.registry.open(SessionKey(tenant, name)) for name in names[:MOST_ALIKE]]
        fitting = [session for session in sessions if session.ended_by(reading)]
        if not fitting or (len(fitting) > 1 and not family):
            return None
        last = len(self.registry.events(fitting[0].key)) - 1
        return TurnLocation(fitting[0].key.session, last, len(fitting[0].turns))


def _leads_on(session: Session, reading: TranscriptDigest) -> bool:
    return session.phase is Phase.CLOSED or session.continued_by(reading)


def _transcript(session: Session, name: str) -> tuple[Message, ...]:
    if not session.kept():
        raise Unprocessable(
            f"found {name!r}, but its text was not kept (retention.text); expected the messages in the request"
        )
    return session.transcript()
