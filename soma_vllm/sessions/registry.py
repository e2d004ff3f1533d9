"""The live sessions: folded in memory at once, written to the session store behind.

Guarantees: `record` never waits for the disk; the store receives every session's events in order; a session
whose events are on record is restored by folding them again; a session that is leased or held stays in memory,
and of the others only the latest do, within `sessions.memory_mib`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from soma_vllm.config import Config
from soma_vllm.errors import NotFound, StoreUnavailable
from soma_vllm.sessions.erasure import LEARNING, TextCache, TextErasure
from soma_vllm.sessions.event_bus import EventBus
from soma_vllm.sessions.live_session import LiveSession, LiveSessions
from soma_vllm.sessions.ports import Observer, Store, in_time
from soma_vllm.sessions.sql.records import AdapterRecord, Append, SessionSnapshot
from soma_vllm.sessions.state.adapter_states import AdapterLives, AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.fold import fold, restore
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.sessions.state.transcript import TranscriptDigest
from soma_vllm.sessions.transcript_index import TranscriptIndex
from soma_vllm.sessions.write_behind import MIB, Write, WriteBehindQueue
from soma_vllm.types import AdapterRef, Event, SessionKey

LIVE_SESSIONS = 100_000
"""Sessions kept in memory beside those in use, whatever their size."""


class SessionRegistry:
    """Live sessions by key. Itself a cache of text."""

    def __init__(
        self,
        config: Config,
        store: Store,
        observers: Sequence[Observer] = (),
        live_sessions: int = LIVE_SESSIONS,
    ) -> None:
        """`observers` hear of recorded events; one that is a `TextCache` as well hears of every erasure."""
        self.config = config
        self.store = store
        """The record."""
        self.bus = EventBus(observers)
        """Hears of every event, once it is folded."""
        caches = [cache for cache in (self, *observers) if isinstance(cache, TextCache)]
        self.erasure = TextErasure(config.retention.text, store, caches)
        self.index = TranscriptIndex()
        """Finds live sessions by transcript."""
        self.write_behind = WriteBehindQueue(store, config.storage.queue_mib)
        """What the record lacks yet."""
        most_bytes = config.sessions.memory_mib * MIB
        self._entries = LiveSessions(live_sessions, most_bytes, self.write_behind.has, self.index.drop)
        self._loading: dict[SessionKey, asyncio.Task[None]] = {}
        self._live: dict[str, int] = {}
        self._begun: set[SessionKey] = set()
        """New sessions whose first request is under way, where they are counted."""
        self._adapters = AdapterLives()

    async def start(self) -> None:
        """Begin writing."""
        await self.write_behind.start()

    async def stop(self) -> None:
        """Write what is still to be written, then end."""
        await self.write_behind.stop()

    async def written(self) -> None:
        """Return when everything recorded so far is in the store."""
        await self.write_behind.written()

    async def open(self, key: SessionKey) -> Session:
        """The session of this key: the live one, the one on record, or a new one.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        while key not in self._entries:
            # One load for all that ask. What it brings may be dropped before the last of them comes to it.
            if key not in self._loading:
                loading = self._loading[key] = asyncio.create_task(self._load(key), name="soma-session-load")
                loading.add_done_callback(lambda task: task.cancelled() or task.exception())
            await asyncio.shield(self._loading[key])
        return self._entries.use(key).session

    async def _load(self, key: SessionKey) -> None:
        try:
            if self.write_behind.has(key):  # its removal, or its last events, are not on record yet
                await in_time(self.write_behind.written())
            session = restore(key, events := await in_time(self.store.events(key)), self.config.gate)
            self._entries[key] = LiveSession(session, events)
            self.index.observe(session, 0, events)
            for event in events:
                self._adapters.recall(event)
            self._entries.account(key)
            self._entries.make_room(key)
        finally:
            del self._loading[key]

    @asynccontextmanager
    async def lease(self, key: SessionKey) -> AsyncIterator[Session]:
        """The session of this key, which stays in memory inside the block. Raises as `open` does."""
        session = await self.open(key)
        self.hold(key)
        try:
            yield session
        finally:
            self.release(key)

    def begin(self, key: SessionKey, pending: tuple[Event, ...] = ()) -> Session:
        """A live session that is new; its first events are recorded together with its first turn."""
        session = restore(key, pending, self.config.gate)
        self._entries[key] = LiveSession(session, pending=pending)
        self._entries.account(key)
        self._entries.make_room(key)
        return session

    def hold(self, key: SessionKey) -> None:
        """Keep a live session in memory until `release`, where no block can: see `lease`."""
        self._entries[key].holds += 1

    def release(self, key: SessionKey) -> None:
        """Give one hold back; harmless where the session was removed."""
        if (entry := self._entries.get(key)) is not None:
            entry.holds -= 1
            if not self._drop_if_unused(key):
                self._entries.make_room(key)

    def holds(self, key: SessionKey) -> int:
        """Requests and background work under way for a session."""
        return 0 if (entry := self._entries.get(key)) is None else entry.holds

    async def unheld(self, key: SessionKey, limit_s: float) -> None:
        """Wait until only the caller holds a session, or the time is over."""
        deadline = time.monotonic() + limit_s
        while self.holds(key) > 1 and time.monotonic() < deadline:
            await asyncio.sleep(0.02)

    def session(self, key: SessionKey) -> Session:
        """A live session as it is now."""
        return self._entries.use(key).session

    def events(self, key: SessionKey) -> Sequence[Event]:
        """The recorded events of a live session."""
        return self._entries.use(key).events

    def session_at(self, key: SessionKey, seq: int) -> Session:
        """A live session as it was after one of its events."""
        return restore(key, self._entries.use(key).events[: seq + 1], self.config.gate)

    @property
    def size(self) -> int:
        """Sessions in memory."""
        return len(self._entries)

    def is_live(self, key: SessionKey) -> bool:
        """Whether a session is in memory."""
        return key in self._entries

    def is_new(self, key: SessionKey) -> bool:
        """Whether nothing of a live session is recorded yet."""
        return self._entries[key].is_new

    async def entry(self, key: SessionKey) -> LiveSession:
        """A session with its events.

        Raises:
            NotFound: this tenant has no such session.
            StoreUnavailable: the session store did not answer within 3 s.
        """
        await self.open(key)
        entry = self._entries[key]
        if entry.is_new:
            self._drop_if_unused(key)
            raise NotFound(f"no session {key.session!r}")
        return entry

    async def live(self, tenant: str) -> int:
        """Dialogues that a tenant has; the branches of one count once."""
        if (known := self._live.get(tenant)) is not None:
            return known
        return self._live.setdefault(tenant, await in_time(self.store.live(tenant)))

    def begun_beside(self, key: SessionKey) -> int:
        """Other new sessions of a tenant whose first turn, under way by `begun`, is not on record."""
        others = [self._entries.get(one) for one in self._begun - {key} if one.tenant == key.tenant]
        return sum(other is None or other.is_new for other in others)

    @contextmanager
    def begun(self, key: SessionKey) -> Iterator[None]:
        """Count a new session as begun inside the block, in which its first turn is recorded."""
        self._begun.add(key)
        try:
            yield
        finally:
            self._begun.discard(key)

    async def adapters(self, tenant: str) -> int:
        """Adapters that a tenant has. Raises as `users_of` does."""
        records = await in_time(self.store.adapters(tenant, retired=False))
        return sum(record.state != AdapterState.RETIRED for record in records)

    async def in_use(self, ref: AdapterRef) -> bool:
        """Whether any session is served by this adapter; True where the store did not answer."""
        try:
            return bool(await self.users_of(ref.name))
        except StoreUnavailable:
            return True

    async def owns(self, adapter: str) -> bool:
        """Whether this record published an adapter. Raises as `users_of` does."""
        return await in_time(self.store.adapter(adapter)) is not None

    async def users_of(self, name: str) -> list[SessionKey]:
        """Sessions that an adapter serves, in memory and on record.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        on_record = await in_time(self.store.users_of(name))
        live = [key for key, entry in self._entries.items() if entry.adapter == name]
        return [*live, *(key for key in on_record if self._elsewhere(key))]

    def _elsewhere(self, key: SessionKey) -> bool:
        """Whether a session is on record only: not in memory, nor just removed from it."""
        return key not in self._entries and not self.write_behind.has(key)

    async def retired(self, adapter: str) -> None:
        """Put on record that an adapter is gone of which no live session speaks. Raises StoreUnavailable."""
        await self.store.retired(adapter)

    def adapter_state(self, name: str) -> AdapterState | None:
        """Where an adapter stands; None where no live session has said so."""
        return self._adapters.of(name)

    async def family(self, session: Session) -> list[SessionKey]:
        """A session with all the branches of its dialogue, where this is its root; else the session alone.

        Raises:
            StoreUnavailable: the session store did not answer within 3 s.
        """
        key = session.key
        if session.is_branch:
            return [key]
        live = {k for k, e in self._entries.items() if e.root == key.session and k.tenant == key.tenant}
        branches = live | set(await in_time(self.store.family(key.tenant, key.session)))
        return [key, *(branches - {key})]

    # -- recording --------------------------------------------------------------------------------------

    def record(self, key: SessionKey, *events: Event) -> Session:
        """Fold events into the session, tell the observers, queue them for the store. Raises IllegalMove."""
        entry = self._entries.use(key)
        if entry.is_new and key.tenant in self._live and not entry.session.is_branch:
            self._live[key.tenant] += 1
        before = entry.session.phase
        noted = [(event.data, self._adapters.note(event)) for event in (*entry.pending, *events)]
        adapters = tuple(AdapterRecord.moved(key, *moved, data) for data, moved in noted if moved)
        for event in events:
            entry.session = fold(entry.session, event, self.config.gate)
        events, entry.pending = (*entry.pending, *events), ()
        self._put_on_record(entry, events, adapters)
        for event in events:
            self.bus.publish(key, event)
        if self.erasure.is_due(before, entry.session.phase):
            self.erasure.forget(key)
            if self.erasure.policy == "until_adapted":
                self.write_behind.put(Write(key, lambda: self.store.erase_text(key)))
        return entry.session

    def note(self, key: SessionKey, kind: EventKind, /, **data: Any) -> Session:
        """Record one event that happens now."""
        return self.record(key, Event(kind, time.time(), data))

    def keep(self, key: SessionKey, do: Callable[[], Awaitable[object]], size: int) -> None:
        """Queue a write of `size` characters that belongs to a session, behind those that it rests on."""
        self.write_behind.put(Write(key, do, size=size))

    def recall(self, key: SessionKey, reading: TranscriptDigest) -> None:
        """Take what the turns said from a request's history, where it is yet to be learned from."""
        entry = self._entries[key]
        refused = entry.session.phase is Phase.ORIGINAL_ONLY and self.erasure.policy == "session"
        if entry.session.phase in LEARNING or refused:
            entry.session = entry.session.with_text(reading)

    def _put_on_record(
        self, entry: LiveSession, events: Sequence[Event], adapters: tuple[AdapterRecord, ...]
    ) -> None:
        session, first_seq = entry.session, len(entry.events)
        marks = self.index.observe(session, first_seq, events)
        snapshot = SessionSnapshot.of(session)
        silent = [_silent(event) for event in events]
        written = events if self.erasure.on_record(session.phase) else silent
        if self.erasure.in_memory(session.phase):
            entry.add(events)
        else:
            entry.add(silent)
            entry.session = session.without_text()
        self._entries.account(session.key)
        self.write_behind.append(Append(session.key, first_seq, written, snapshot, marks, adapters))

    def forget(self, key: SessionKey) -> None:
        """Drop from memory what was said in a session."""
        if (entry := self._entries.get(key)) is not None:
            entry.replace_events([_silent(event) for event in entry.events])
            entry.session = entry.session.without_text()
            self._entries.account(key)

    def forget_before(self, at: float) -> None:
        """Drop from memory what was said before a Unix time, but for sessions that are being adapted."""
        for key, entry in list(self._entries.items()):
            if not entry.has_text_before(at) or (entry.is_packed and self._entries.let_go(key)):
                continue
            if entry.session.phase is not Phase.ADAPTING:
                entry.replace_events([_silent(e) if e.at < at else e for e in entry.events])
                entry.session = restore(key, (*entry.events, *entry.pending), self.config.gate)
            self._entries.account(key)

    def discard(self, key: SessionKey) -> None:
        """Drop a session of which nothing is recorded, and nothing will be."""
        self._entries.drop(key)

    def remove(self, key: SessionKey) -> None:
        """Drop a session from memory, and queue its removal from the store."""
        removed = self._entries.drop(key)
        self.index.drop(key)
        self.erasure.forget(key)
        if removed is not None and not removed.session.is_branch and key.tenant in self._live:
            self._live[key.tenant] -= 1
        self.write_behind.put(Write(key, lambda: self.store.delete(key), removes=True))

    def _drop_if_unused(self, key: SessionKey) -> bool:
        """Drop a session that is not in use and of which nothing is recorded; whether it was one."""
        entry = self._entries.get(key)
        unused = entry is not None and not entry.holds and entry.is_new
        if unused:
            self._entries.drop(key)
        return unused


def _silent(event: Event) -> Event:
    return event if event.text is None else replace(event, text=None)
