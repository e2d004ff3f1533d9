"""The book of live sessions: folded in memory at once, written to the event log behind.

Guarantees: `record` never waits for the disk; the log receives every session's events in order; a session
whose events are on record is restored by folding them again; nothing is found outside its tenant; a session
that somebody holds stays in memory, and of the others only the latest do.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

from soma_vllm.config import Config
from soma_vllm.errors import EngineUnavailable, NotFound
from soma_vllm.scheduler.ports import EventLog, Observer
from soma_vllm.session.session import Session, fold, restore
from soma_vllm.session.transcript import answered, fingerprint
from soma_vllm.types import Event, Message, SessionKey

logger = logging.getLogger(__name__)


LIVE_SESSIONS = 10_000
"""Sessions kept in memory beside those in use: with 10 kB of text each, some 200 MB."""


@dataclass
class Entry:
    """A live session and its log."""

    session: Session
    events: list[Event] = field(default_factory=list)
    holds: int = 0
    """Requests and background work under way."""
    unwritten: int = 0
    """Appends that are not on record yet."""
    chains: set[str] = field(default_factory=set)
    """Fingerprints by which its next request is recognised."""


@dataclass(frozen=True)
class Write:
    """One append to the log."""

    key: SessionKey
    first_seq: int
    events: Sequence[Event]
    phase: str
    chain: str


class SessionBook:
    """Sessions by key, and by transcript."""

    def __init__(
        self,
        config: Config,
        log: EventLog,
        observers: Sequence[Observer] = (),
        live_sessions: int = LIVE_SESSIONS,
    ) -> None:
        self._config = config
        self._live_sessions = live_sessions
        self._log = log
        self._observers = tuple(observers)
        self._entries: OrderedDict[SessionKey, Entry] = OrderedDict()
        self._by_chain: dict[tuple[str, str], SessionKey] = {}
        self._writes: asyncio.Queue[Write] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None
        self._unwritten: set[SessionKey] = set()
        self._opening: dict[SessionKey, asyncio.Lock] = {}

    async def start(self) -> None:
        """Begin writing."""
        self._writer = asyncio.create_task(self._write_all(), name="soma-session-writer")

    async def stop(self) -> None:
        """Write what is still to be written, then end."""
        if self._writer is None:
            return
        written = asyncio.ensure_future(self._writes.join())
        await asyncio.wait([written, self._writer], return_when=asyncio.FIRST_COMPLETED)
        written.cancel()
        self._writer.cancel()

    async def open(self, key: SessionKey) -> Session:
        """The session of this key: the live one, the one on record, or a new one."""
        if (entry := self._entries.get(key)) is not None:
            self._entries.move_to_end(key)
            return entry.session
        async with self._opening.setdefault(key, asyncio.Lock()):
            if key not in self._entries:
                with _outage_is_unavailability():
                    events = await self._log.events(key)
                self._entries[key] = Entry(restore(key, events, self._config), events)
        self._opening.pop(key, None)
        session = self._entries[key].session
        self._forget_oldest(key)
        return session

    def hold(self, key: SessionKey) -> None:
        """Keep a live session in memory until `release`."""
        self._entries[key].holds += 1

    def release(self, key: SessionKey) -> None:
        """Give one hold back."""
        self._entries[key].holds -= 1

    async def recognise(self, tenant: str, messages: Sequence[Message]) -> SessionKey:
        """The session whose transcript the request continues; a new one where there is none."""
        history = answered(messages)
        if history:
            chain = fingerprint(history)
            key = self._by_chain.get((tenant, chain))
            if key is not None:
                return key
            with _outage_is_unavailability():
                session = await self._log.find(tenant, chain)
            if session is not None:
                return SessionKey(tenant, session)
        return SessionKey(tenant, f"auto-{uuid.uuid4().hex}")

    def session(self, key: SessionKey) -> Session:
        """A live session as it is now."""
        return self._entries[key].session

    async def entry(self, key: SessionKey) -> Entry:
        """A session with its events.

        Raises:
            NotFound: this tenant has no such session.
        """
        entry = self._entries.get(key)
        if entry is None and await self._log.events(key):
            await self.open(key)
            entry = self._entries[key]
        if entry is None or not entry.events:
            raise NotFound(f"no session {key.session!r}")
        return entry

    def record(self, key: SessionKey, *events: Event) -> Session:
        """Fold events into the session, tell the observers, and queue them for the log."""
        entry = self._entries[key]
        first_seq = len(entry.events)
        for event in events:
            entry.session = fold(entry.session, event, self._config)
            entry.events.append(event)
            for observe in self._observers:
                observe(key, event)
        chain = entry.session.chain()
        self._index(key, entry)
        entry.unwritten += 1
        self._writes.put_nowait(Write(key, first_seq, events, entry.session.phase, chain))
        return entry.session

    def _index(self, key: SessionKey, entry: Entry) -> None:
        """Make a session recognisable by its transcript, and by the one before its last turn, for retries."""
        turns = len(entry.session.turns)
        chains = {fingerprint(entry.session.transcript(n)) for n in (turns - 1, turns) if n > 0}
        for chain in entry.chains - chains:
            if self._by_chain.get((key.tenant, chain)) == key:
                del self._by_chain[key.tenant, chain]
        for chain in chains:
            self._by_chain[key.tenant, chain] = key
        entry.chains = chains

    def _forget_oldest(self, newest: SessionKey) -> None:
        """Drop sessions that the log can restore, beyond those that may stay in memory."""
        surplus = len(self._entries) - self._live_sessions
        idle = (
            key
            for key, entry in self._entries.items()
            if not (entry.holds or entry.unwritten or key in self._unwritten or key == newest)
        )
        for key in list(islice(idle, max(0, surplus))):
            for chain in self._entries.pop(key).chains:
                if self._by_chain.get((key.tenant, chain)) == key:
                    del self._by_chain[key.tenant, chain]

    def note(self, key: SessionKey, kind: str, **data: Any) -> Session:
        """Record one event that happens now."""
        return self.record(key, Event(kind, time.time(), data))

    async def _write_all(self) -> None:
        while True:
            write = await self._writes.get()
            try:
                await self._write(write)
            finally:
                self._entries[write.key].unwritten -= 1
                self._writes.task_done()

    async def _write(self, write: Write) -> None:
        if write.key in self._unwritten:
            return
        attempts = AsyncRetrying(
            retry=retry_if_exception(_may_pass),
            stop=stop_after_attempt(5),
            wait=wait_exponential(multiplier=0.2, max=5),
            reraise=True,
        )
        try:
            async for attempt in attempts:
                with attempt:
                    await self._log.append(write.key, write.first_seq, write.events, write.phase, write.chain)
        except (SQLAlchemyError, OSError) as error:
            # What is on record stays a true beginning of the session: nothing is written after a gap.
            self._unwritten.add(write.key)
            logger.error("a session goes on in memory only: %s", type(error).__name__)


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: the database was away or full, not contradicted."""
    return isinstance(error, SQLAlchemyError | OSError) and not isinstance(error, IntegrityError)


@contextmanager
def _outage_is_unavailability() -> Iterator[None]:
    """Without its record a session must not be served as if it were new."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise EngineUnavailable(f"the session store does not answer ({type(error).__name__})") from error
