"""Sessions in memory: as objects while they are in use, packed while they are idle and memory is short.

Guarantees: packing changes nothing that can be seen, and what idle sessions are asked for most (their adapters,
their dialogues) is known without unpacking; one that is held is neither packed nor dropped; one request packs a
few sessions at most. Bytes are estimates; `benchmarks/memory.py` measures.
"""

from __future__ import annotations

import math
import pickle
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from soma_vllm.sessions.sql.records import characters
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Event, SessionKey

EVENT_BYTES = 3000
"""Of an event and the turn that it records, as objects, their text apart: measured."""
INDEX_BYTES = 600
"""Of an event in the index of transcripts, which stays: measured."""
SESSION_BYTES = 2500
"""Of a session without events."""
FAST = 1
"""zlib's level."""
PACKED_AT_ONCE = 4
"""Most sessions that one request packs, at about a millisecond each; as many are dropped."""
LARGE_BYTES = 1 << 20
"""A session that takes longer to pack, and is dropped instead where it can be read again."""


class LiveSession:
    """A live session, its log, and what keeps it in memory."""

    def __init__(self, session: Session, events: Iterable[Event] = (), pending: tuple[Event, ...] = ()) -> None:
        self._session: Session | None = session
        self._events: list[Event] = []
        self._packed = b""
        self._adapter: str | None = None
        self.key = session.key
        self.root = session.root
        """The id of the session that its dialogue began with."""
        self.pending = pending
        """What a branch begins with; on record with its first turn."""
        self.holds = 0
        """Requests and background work under way."""
        self.accounted = 0
        """Its size, as it is in the sum over all."""
        self._text = 0
        self._oldest_text = math.inf
        self._count = 0
        self.add(events)

    def __repr__(self) -> str:
        return f"LiveSession({self.session!r}, {self.events!r}, {self.pending!r}, holds={self.holds})"

    @property
    def session(self) -> Session:
        """The session as it is now."""
        if self._session is None:
            self._session, self._events = pickle.loads(zlib.decompress(self._packed))
            self._packed = b""
        return self._session

    @session.setter
    def session(self, session: Session) -> None:
        self.unpack()
        self._session, self.root = session, session.root

    @property
    def events(self) -> Sequence[Event]:
        """Its log."""
        self.unpack()
        return self._events

    def add(self, events: Iterable[Event]) -> None:
        """Put events at the end of the log."""
        self.unpack()
        for event in events:
            self._events.append(event)
            if event.text is not None:
                self._text += characters(event.text)
                self._oldest_text = min(self._oldest_text, event.at)
        self._count = len(self._events)

    def replace_events(self, events: Iterable[Event]) -> None:
        """Have another log, such as one without text."""
        self.unpack()
        self._events, self._text, self._oldest_text = [], 0, math.inf
        self.add(events)

    @property
    def is_new(self) -> bool:
        """Whether nothing of it is recorded yet."""
        return not self._count

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that serves it."""
        if self._session is None:
            return self._adapter
        return None if self._session.adapter is None else self._session.adapter.name

    def has_text_before(self, at: float) -> bool:
        """Whether an event from before a Unix time has text."""
        return self._oldest_text < at

    @property
    def size(self) -> int:
        """Bytes, nearly."""
        objects = len(self._packed) or EVENT_BYTES * self._count + self._text
        return SESSION_BYTES + INDEX_BYTES * self._count + objects

    @property
    def is_packed(self) -> bool:
        """Whether it is kept as bytes."""
        return self._session is None

    def unpack(self) -> None:
        """Have the objects again."""
        assert self.session is not None

    def pack(self) -> None:
        """Keep it as compressed bytes until it is used again. Its log may hold text that is nowhere else."""
        self._adapter, session = self.adapter, self.session
        self._packed = zlib.compress(pickle.dumps((session, self._events), pickle.HIGHEST_PROTOCOL), FAST)
        self._session, self._events = None, []


class LiveSessions(OrderedDict[SessionKey, LiveSession]):
    """Live sessions, the least recently used first, within bounds on their number and bytes. Sessions beyond
    them are packed, then dropped, unless they are held or `needed`."""

    def __init__(
        self,
        most: int,
        most_bytes: int,
        needed: Callable[[SessionKey], bool],
        on_drop: Callable[[SessionKey], None],
    ) -> None:
        """`needed`: the store cannot restore it yet. `on_drop` is told of each that goes for want of room."""
        super().__init__()
        self._most = most
        self._most_bytes = most_bytes
        self._needed = needed
        self._on_drop = on_drop
        self._unpacked: OrderedDict[SessionKey, None] = OrderedDict()
        self.bytes = 0
        """Of all, nearly."""

    def use(self, key: SessionKey) -> LiveSession:
        """A session as objects; it is the most recently used now. Raises KeyError."""
        found = self[key]
        found.unpack()
        self.move_to_end(key)
        self.account(key)
        return found

    def account(self, key: SessionKey) -> None:
        """Count a session that has changed."""
        found = self[key]
        self.bytes += found.size - found.accounted
        found.accounted = found.size
        if found.is_packed:
            self._unpacked.pop(key, None)
        else:
            self._unpacked[key] = None
            self._unpacked.move_to_end(key)

    def drop(self, key: SessionKey) -> LiveSession | None:
        """Take a session out; None where it is not in."""
        found = self.pop(key, None)
        if found is not None:
            self.bytes -= found.accounted
            self._unpacked.pop(key, None)
        return found

    def make_room(self, newest: SessionKey) -> None:
        """Pack and drop what is idle, beyond the bounds; not the newest."""
        idle = (key for key in self if self._is_idle(key, newest))
        for key in list(islice(idle, max(0, len(self) - self._most))):
            self._go(key)
        if self.bytes <= self._most_bytes:
            return
        loose = (key for key in self._unpacked if not self[key].holds and key != newest)
        for key in list(islice(loose, PACKED_AT_ONCE)):
            if self.bytes <= self._most_bytes:
                return
            if self[key].size > LARGE_BYTES and not self._needed(key):
                self._go(key)
            else:
                self[key].pack()
                self.account(key)
        packed = (key for key, one in self.items() if one.is_packed and self._is_idle(key, newest))
        for key in list(islice(packed, PACKED_AT_ONCE)):
            if self.bytes > self._most_bytes:
                self._go(key)

    def let_go(self, key: SessionKey) -> bool:
        """Drop a session if nothing uses it and the store can restore it; whether that was done."""
        if not self._is_idle(key, None):
            return False
        self._go(key)
        return True

    def _is_idle(self, key: SessionKey, newest: SessionKey | None) -> bool:
        return not (self[key].holds or key == newest or self._needed(key))

    def _go(self, key: SessionKey) -> None:
        self.drop(key)
        self._on_drop(key)
