"""The book of live sessions: folded in memory at once, written to the session store behind.

Guarantees: `record` never waits for the disk; the store receives every session's events in order; a session
whose events are on record is restored by folding them again; nothing is found outside its tenant; a session
that somebody holds stays in memory, and of the others only the latest do; a history that leaves a session's
record goes on in a branch of its own, so that no request takes another one's turn away.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from soma_vllm.config import Config
from soma_vllm.errors import NotFound, StoreUnavailable, Unprocessable
from soma_vllm.sessions.ports import Observer, Store
from soma_vllm.sessions.sql.records import AdapterRecord, SessionSnapshot, TurnLocation, TurnMark
from soma_vllm.sessions.sql.tables import RETIRED
from soma_vllm.sessions.state.adapter_states import AdapterLives, AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.fold import branch_event, fold, inheritance, restore
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import RECOGNISED, Session
from soma_vllm.sessions.state.transcript import TranscriptDigest
from soma_vllm.sessions.state.turn import Turn, turn_of
from soma_vllm.sessions.transcript_index import TranscriptIndex
from soma_vllm.sessions.write_behind import Write, WriteBehindQueue
from soma_vllm.types import AdapterRef, Event, Message, SessionKey

LIVE_SESSIONS = 10_000
"""Sessions kept in memory beside those in use: with 10 kB of text each, some 200 MB."""

MOST_BEHIND = 50_000
"""Unwritten events above which no more are taken on: turns go unrecorded until the store is back."""

LOOKUP_S = 3.0
"""Longest wait for the store while a user waits."""

UNHELD_EVERY_S = 0.02

SURE_EXCHANGES = 2
"""Whole exchanges that must be left of a history without an id for its session to be recognised by them."""

MOST_ALIKE = 5
"""Sessions that end alike, of which none is looked at any more without an id."""

LEARNING = frozenset({Phase.WARM_START, Phase.ADAPTING, Phase.ROLLED_BACK})
"""Phases in which what was said may still be learned from."""


@dataclass
class Entry:
    """A live session and its log."""

    session: Session
    events: list[Event] = field(default_factory=list)
    pending: tuple[Event, ...] = ()
    """What a branch begins with; on record with its first turn."""
    holds: int = 0
    """Requests and background work under way."""


@dataclass(frozen=True)
class StoredTranscript:
    """A transcript up to an answer that a client names."""

    session: str
    messages: tuple[Message, ...]


class SessionRegistry:
    """Sessions by key, and by transcript."""

    def __init__(
        self,
        config: Config,
        store: Store,
        observers: Sequence[Observer] = (),
        live_sessions: int = LIVE_SESSIONS,
    ) -> None:
        self._config = config
        self._live_sessions = live_sessions
        self._store = store
        self._observers = tuple(observers)
        self._entries: OrderedDict[SessionKey, Entry] = OrderedDict()
        self._index = TranscriptIndex(lambda key: self._entries[key].session.chain())
        self._write_behind = WriteBehindQueue()
        self._opening: dict[SessionKey, asyncio.Lock] = {}
        self._live: dict[str, int] = {}
        self._adapters = AdapterLives()

    @property
    def store(self) -> Store:
        """The record, for questions about sessions that need not be live."""
        return self._store

    async def start(self) -> None:
        """Begin writing."""
        await self._write_behind.start()

    async def stop(self) -> None:
        """Write what is still to be written, then end."""
        await self._write_behind.stop()

    async def written(self) -> None:
        """Return when everything recorded so far is in the store."""
        await self._write_behind.written()

    # -- finding a session ------------------------------------------------------------------------------

    async def place(self, tenant: str, named: str | None, reading: TranscriptDigest) -> SessionKey:
        """The session that a request continues, open and held: the one it names, a branch of it, the one whose
        transcript it repeats, or a new one.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        if self._write_behind.behind > MOST_BEHIND:
            raise StoreUnavailable(f"{self._write_behind.behind} events wait for the session store")
        found = None
        if named is None:
            found = await self._find(tenant, "", reading) or await self._find_trimmed(tenant, "", reading)
            named = f"{RECOGNISED}{uuid.uuid4().hex}" if found is None else found.session
        session = await self.open(SessionKey(tenant, named))
        if not self._leads_on(session, reading):
            session = await self._other(session, found, reading)
        self.hold(session.key)
        return session.key

    async def _other(self, session: Session, found: TurnLocation | None, reading: TranscriptDigest) -> Session:
        """Where a request goes that does not continue the session it seemed to."""
        tenant, family = session.key.tenant, session.family
        again = self._index.asked_by(tenant, family, reading.asked) if reading.marks else None
        if again is not None and self._entries[again].session.asked_again_by(reading):
            return self._entries[again].session
        if found is None:
            found = await self._find(tenant, family, reading)
        if found is None or found.number < len(reading.marks):
            found = await self._find_trimmed(tenant, family, reading) or found
        if found is None:
            return self._branch(session, session.turns[: session.overlap(reading).turns])
        other = await self.open(SessionKey(tenant, found.session))
        return (
            other if self._leads_on(other, reading) else self._branch(other, self._turns_at(other, found.seq))
        )

    def _leads_on(self, session: Session, reading: TranscriptDigest) -> bool:
        return session.phase is Phase.CLOSED or session.continued_by(reading)

    def settle(self, key: SessionKey, reading: TranscriptDigest) -> SessionKey:
        """Where a request belongs once it is answered, held: its session, or a branch of it if that went on
        meanwhile. Give the hold back."""
        session = self._entries[key].session
        if not session.continued_by(reading):
            count, _ = session.repeated(reading)
            key = self._branch(session, session.turns[:count]).key
        self.hold(key)
        return key

    def _branch(self, parent: Session, turns: Sequence[Turn]) -> Session:
        """A session that begins with some turns of another, in memory until its own first turn."""
        now = time.time()
        family = parent.family
        unique = uuid.uuid4().hex
        name = f"{family}~{unique[:12]}" if family else f"{RECOGNISED}{unique}"
        inherited = inheritance(parent, turns, now) if self._may_inherit(parent) else None
        first = branch_event(parent, turns, now)
        pending = (first,) if inherited is None else (first, inherited)
        session = restore(SessionKey(parent.key.tenant, name), pending, self._config.gate)
        self._entries[session.key] = Entry(session, pending=pending)
        return session

    def _may_inherit(self, parent: Session) -> bool:
        """Whether what serves a session may serve another one as well: not while its adapter leaves."""
        state = None if parent.adapter is None else self._adapters.of(parent.adapter.name)
        return state not in (AdapterState.DRAINING, AdapterState.RETIRED)

    def _turns_at(self, session: Session, seq: int) -> tuple[Turn, ...]:
        """The turns of a session as one of its events left them."""
        events = self._entries[session.key].events[: seq + 1]
        past = restore(session.key, events, self._config.gate)
        if events[-1].kind != EventKind.VARIANT:
            return past.turns
        turn = turn_of(events[-1].data, events[-1].text)
        return (*past.turns[: turn.number - 1], turn)

    async def _find(self, tenant: str, family: str, reading: TranscriptDigest) -> TurnLocation | None:
        """The turn on record with which a request's history agrees furthest."""
        if not reading.marks:
            return None
        chains = reading.chains()
        hit = self._index.find(tenant, family, chains)
        if hit is not None and hit.exact and hit.found.number == len(reading.marks):
            return hit.found
        async with _store_answers():
            on_record = await self._store.find(tenant, family, chains)
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
        async with _store_answers():
            on_record = await self._store.standing(tenant, family, link, MOST_ALIKE)
        names = list(dict.fromkeys([*on_record, *self._index.with_link(tenant, family, link)]))
        if len(names) >= MOST_ALIKE and not family:
            return None
        sessions = [await self.open(SessionKey(tenant, name)) for name in names[:MOST_ALIKE]]
        fitting = [session for session in sessions if session.ended_by(reading)]
        if not fitting or (len(fitting) > 1 and not family):
            return None
        last = len(self._entries[fitting[0].key].events) - 1
        return TurnLocation(fitting[0].key.session, last, len(fitting[0].turns))

    async def said(self, tenant: str, response: str) -> StoredTranscript:
        """The transcript up to the answer of this id.

        Raises:
            NotFound: this tenant has no such response.
            Unprocessable: its text was not kept.
            StoreUnavailable: the session store did not answer within 3 s.
        """
        found = self._index.of_response(tenant, response)
        if found is None:
            async with _store_answers():
                found = await self._store.of_response(tenant, response)
        if found is None:
            raise NotFound(f"no response {response!r}")
        session = await self.open(SessionKey(tenant, found.session))
        turns = self._turns_at(session, found.seq)
        return StoredTranscript(found.session, _transcript(replace(session, turns=turns), response))

    async def conversation(self, tenant: str, name: str) -> tuple[Message, ...]:
        """The transcript of a session so far; empty for a new one. Raises as `said` does."""
        session = await self.open(SessionKey(tenant, name))
        self._drop_if_unused(session.key)
        return _transcript(session, name)

    # -- live sessions ----------------------------------------------------------------------------------

    async def open(self, key: SessionKey) -> Session:
        """The session of this key: the live one, the one on record, or a new one.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        if (entry := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
            return entry.session
        async with self._opening.setdefault(key, asyncio.Lock()):
            if key not in self._entries:
                async with _store_answers():
                    events = await self._store.events(key)
                session = restore(key, events, self._config.gate)
                self._entries[key] = Entry(session, events)
                for seq, event in enumerate(events):
                    self._index.add(key, session.family, _marks(seq, event))
                    self._adapters.recall(event)
                if session.turns:
                    self._index.ask(key, session.family, session.turns[-1].asked)
        self._opening.pop(key, None)
        session = self._entries[key].session
        self._forget_oldest(key)
        return session

    def hold(self, key: SessionKey) -> None:
        """Keep a live session in memory until `release`."""
        self._entries[key].holds += 1

    def release(self, key: SessionKey) -> None:
        """Give one hold back; harmless when the session was removed meanwhile."""
        entry = self._entries.get(key)
        if entry is None:
            return
        entry.holds -= 1
        self._drop_if_unused(key)

    def holds(self, key: SessionKey) -> int:
        """Requests and background work under way for a session."""
        entry = self._entries.get(key)
        return 0 if entry is None else entry.holds

    async def unheld(self, key: SessionKey, limit_s: float) -> None:
        """Wait until nobody but the caller holds a session, or the time is over."""
        deadline = time.monotonic() + limit_s
        while self.holds(key) > 1 and time.monotonic() < deadline:
            await asyncio.sleep(UNHELD_EVERY_S)

    def session(self, key: SessionKey) -> Session:
        """A live session as it is now."""
        return self._entries[key].session

    def is_live(self, key: SessionKey) -> bool:
        """Whether a session is in memory."""
        return key in self._entries

    def is_new(self, key: SessionKey) -> bool:
        """Whether nothing of a live session is recorded yet."""
        return not self._entries[key].events

    async def entry(self, key: SessionKey) -> Entry:
        """A session with its events.

        Raises:
            NotFound: this tenant has no such session.
            StoreUnavailable: the session store did not answer within 3 s.
        """
        await self.open(key)
        entry = self._entries[key]
        if not entry.events:
            self._drop_if_unused(key)
            raise NotFound(f"no session {key.session!r}")
        return entry

    async def live(self, tenant: str) -> int:
        """Sessions that a tenant has."""
        if tenant not in self._live:
            async with _store_answers():
                count = await self._store.live(tenant)
            self._live.setdefault(tenant, count)
        return self._live[tenant]

    async def adapters(self, tenant: str) -> int:
        """Adapters that a tenant has."""
        async with _store_answers():
            records = await self._store.adapters(tenant, retired=False)
        return sum(record.state != RETIRED for record in records)

    async def in_use(self, ref: AdapterRef) -> bool:
        """Whether any session is served by this adapter; True where nobody can tell."""
        if any(_uses(entry.session, ref.name) for entry in self._entries.values()):
            return True
        try:
            async with _store_answers():
                users = await self._store.users_of(ref.name)
        except StoreUnavailable:
            return True
        return any(self._elsewhere(key) for key in users)

    async def users_of(self, name: str) -> list[SessionKey]:
        """Sessions that an adapter serves, in memory and on record.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        async with _store_answers():
            on_record = await self._store.users_of(name)
        live = [e.session.key for e in self._entries.values() if _uses(e.session, name)]
        return [*live, *(key for key in on_record if self._elsewhere(key))]

    def _elsewhere(self, key: SessionKey) -> bool:
        """Whether a session is on record only: not in memory, and not removed from it a moment ago."""
        return key not in self._entries and not self._write_behind.has(key)

    async def retired(self, adapter: str) -> None:
        """Put on record that an adapter is gone of which no live session speaks. Raises StoreUnavailable."""
        await self._store.retired(adapter)

    def adapter_state(self, name: str) -> AdapterState | None:
        """Where an adapter stands; None where no live session has said so."""
        return self._adapters.of(name)

    async def family(self, session: Session) -> list[SessionKey]:
        """Every branch of a dialogue that a client named, where this is its root; else the session alone.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        key = session.key
        if session.family != key.session:
            return [key]
        live = {e.session.key for e in self._entries.values() if e.session.family == session.family}
        async with _store_answers():
            on_record = await self._store.family(key.tenant, session.family)
        branches = {k for k in live if k.tenant == key.tenant} | set(on_record)
        return [key, *(branches - {key})]

    # -- recording --------------------------------------------------------------------------------------

    def record(self, key: SessionKey, *events: Event) -> Session:
        """Fold events into the session, tell the observers, and queue them for the store."""
        entry = self._entries[key]
        if not entry.events and key.tenant in self._live:
            self._live[key.tenant] += 1
        before = entry.session.phase
        adapters = tuple(self._moved((*entry.pending, *events)))
        for event in events:
            entry.session = fold(entry.session, event, self._config.gate)
        events, entry.pending = (*entry.pending, *events), ()
        self._put_on_record(entry, events, adapters)
        for event in events:
            for observe in self._observers:
                observe(key, event)
        if before in LEARNING and entry.session.phase not in LEARNING:
            self._fall_silent(entry)
        return entry.session

    def note(self, key: SessionKey, kind: EventKind, /, **data: Any) -> Session:
        """Record one event that happens now."""
        return self.record(key, Event(kind, time.time(), data))

    def recall(self, key: SessionKey, reading: TranscriptDigest) -> None:
        """Take what the turns said from a request's history, where it is yet to be learned from."""
        entry = self._entries[key]
        refused = entry.session.phase is Phase.ORIGINAL_ONLY and self._config.retention.text == "session"
        if entry.session.phase in LEARNING or refused:
            entry.session = entry.session.with_text(reading)

    def _moved(self, events: Iterable[Event]) -> Iterable[AdapterRecord]:
        """The adapters that events move, as they leave them. Raises IllegalMove."""
        for event in events:
            if (found := self._adapters.note(event)) is not None:
                ref, state = found
                yield AdapterRecord(ref.name, ref.number, ref.path, state)

    def _put_on_record(
        self, entry: Entry, events: Sequence[Event], adapters: tuple[AdapterRecord, ...]
    ) -> None:
        session = entry.session
        policy = self._config.retention.text
        learning = session.phase in LEARNING
        first_seq = len(entry.events)
        in_memory = policy == "session" or learning
        on_record = policy == "session" or (policy == "until_adapted" and learning)
        entry.events += events if in_memory else [_silent(event) for event in events]
        if not in_memory:
            entry.session = session.without_text()
        written = tuple(events) if on_record else tuple(_silent(event) for event in events)
        marks = tuple(m for seq, event in enumerate(events, first_seq) for m in _marks(seq, event))
        if marks:
            self._index.add(session.key, session.family, marks)
            self._index.ask(session.key, session.family, session.turns[-1].asked)
        standing = _standing(session)

        async def append() -> None:
            await self._store.append(session.key, first_seq, written, standing, marks, adapters)

        self._write_behind.put(Write(session.key, append))

    def _fall_silent(self, entry: Entry) -> None:
        """Nothing is learned from a session any more: erase what was kept for that alone."""
        key, policy = entry.session.key, self._config.retention.text
        if policy == "session":
            return
        entry.events = [_silent(event) for event in entry.events]
        entry.session = entry.session.without_text()
        if policy == "until_adapted":
            self._write_behind.put(Write(key, lambda: self._store.erase_text(key)))

    def forget_texts_before(self, at: float) -> None:
        """Erase from memory what was said before a time, but for what is being learned from this moment."""
        for entry in self._entries.values():
            old = [event for event in entry.events if event.text is not None and event.at < at]
            if old and entry.session.phase is not Phase.ADAPTING:
                entry.events = [_silent(e) if e.at < at else e for e in entry.events]
                entry.session = restore(entry.session.key, (*entry.events, *entry.pending), self._config.gate)

    def discard(self, key: SessionKey) -> None:
        """Drop a session of which nothing is recorded, and nothing will be."""
        self._entries.pop(key, None)

    def remove(self, key: SessionKey) -> None:
        """Drop a session from memory, and queue its removal from the store."""
        self._entries.pop(key, None)
        self._index.drop(key)
        if key.tenant in self._live:
            self._live[key.tenant] -= 1
        self._write_behind.put(Write(key, lambda: self._store.delete(key), anew=True))

    # -- memory -----------------------------------------------------------------------------------------

    def _drop_if_unused(self, key: SessionKey) -> None:
        """Drop a session that was opened and never came to anything."""
        entry = self._entries.get(key)
        if entry is not None and not entry.holds and not entry.events:
            del self._entries[key]

    def _forget_oldest(self, newest: SessionKey) -> None:
        """Drop sessions that the store can restore, beyond those that may stay in memory."""
        surplus = len(self._entries) - self._live_sessions
        idle = (
            key
            for key, entry in self._entries.items()
            if not (entry.holds or self._write_behind.has(key) or key == newest)
        )
        for key in list(islice(idle, max(0, surplus))):
            del self._entries[key]
            self._index.drop(key)


def _transcript(session: Session, name: str) -> tuple[Message, ...]:
    if not session.kept():
        raise Unprocessable(
            f"found {name!r}, but its text was not kept (retention.text); expected the messages in the request"
        )
    return session.transcript()


def _silent(event: Event) -> Event:
    return event if event.text is None else replace(event, text=None)


def _marks(seq: int, event: Event) -> tuple[TurnMark, ...]:
    if event.kind not in (EventKind.TURN, EventKind.VARIANT):
        return ()
    data = event.data
    links = data.get("links") or (None,)
    return (TurnMark(seq, data["number"], data["chain"], data["response"], links[-1]),)


def _standing(session: Session) -> SessionSnapshot:
    adapter = None if session.adapter is None else session.adapter.name
    return SessionSnapshot(session.family, session.phase, session.chain(), len(session.turns), adapter)


def _uses(session: Session, adapter: str) -> bool:
    return session.adapter is not None and session.adapter.name == adapter


@asynccontextmanager
async def _store_answers() -> AsyncIterator[None]:
    """Raises StoreUnavailable where the store does not answer in time: without its record a session must not be
    served as if it were new."""
    try:
        async with asyncio.timeout(LOOKUP_S):
            yield
    except TimeoutError as error:
        raise StoreUnavailable(f"the session store did not answer within {LOOKUP_S:g} s") from error
