"""The write-behind queue: everything that goes to the session store, in order; no request waits for it.

Guarantees: while the database is away, or its disk is full, writes wait and are tried again. A session whose
write is refused, or fails in a way that is not the database's, is given up alone; what is on record of it has
no gaps, because nothing is written after one. Appends that wait together go in one transaction, and so do
removals. A kill costs each session at most the writes that were still queued, the latest ones. `stop` ends
within its limit whatever the database does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential

from soma_vllm.errors import StoreRefused, StoreUnavailable
from soma_vllm.logs import bind_session
from soma_vllm.sessions.ports import Store
from soma_vllm.sessions.sql.records import Append
from soma_vllm.supervised import SupervisedTask
from soma_vllm.types import SessionKey

logger = logging.getLogger(__name__)

STOP_LIMIT_S = 10.0
"""Longest wait for the last writes when the server stops."""
MIB = 1024 * 1024
MOST_BEHIND = 50_000
"""Writes above which no more turns are taken on, whatever their size."""
BATCH = 64
"""Most appends in one transaction."""
BATCH_CHARACTERS = 4_000_000
"""Conversation text above which a transaction takes no further append."""


@dataclass(frozen=True)
class Write:
    """One thing to do to the store for one session, other than an append."""

    key: SessionKey
    do: Callable[[], Awaitable[object]]
    removes: bool = False
    """Removes the session, which may be done although earlier writes of it were lost."""
    size: int = 0


class WriteBehindQueue:
    """Does one write after another; appends in batches."""

    def __init__(self, store: Store, most_mib: int, stop_limit_s: float = STOP_LIMIT_S) -> None:
        """`most_mib`: conversation text, MiB, that may wait before `require_room` raises."""
        self._store = store
        self._most_characters = most_mib * MIB
        self._stop_limit_s = stop_limit_s
        self._queue: deque[tuple[float, Write | Append | asyncio.Future[None]]] = deque()
        self._more = asyncio.Event()
        self._waiting: Counter[SessionKey] = Counter()
        self._given_up: set[SessionKey] = set()
        self._taken: float | None = None
        self.characters = 0
        """Conversation text that waits."""
        self.task = SupervisedTask("session-writer", self._write_all)
        """Writes, until `stop`."""

    async def start(self) -> None:
        """Begin writing, once: two writers would not keep the order."""
        self.task.start()

    async def stop(self) -> None:
        """Write what is still to be written, then end."""
        if not self.task.alive:
            return
        written = asyncio.ensure_future(self.written())
        await asyncio.wait([written], timeout=self._stop_limit_s)
        if self.behind:
            logger.error(
                "the session store did not take all writes within %g s; %d writes are lost, and with them the "
                "latest turns of their sessions",
                self._stop_limit_s,
                self.behind,
            )
        written.cancel()
        await self.task.stop()

    def put(self, write: Write) -> None:
        """Queue a write."""
        self._enqueue(write)

    def append(self, append: Append) -> None:
        """Queue an append."""
        self._enqueue(append)

    def require_room(self) -> None:
        """Raise StoreUnavailable where so much waits that a further turn must go unrecorded."""
        if self.task.given_up:
            raise StoreUnavailable("the task that writes to the session store has ended")
        if self.behind > MOST_BEHIND or self.characters > self._most_characters:
            raise StoreUnavailable(f"{self.behind} writes wait for the session store")

    async def written(self) -> None:
        """Return when everything queued before the call is done.

        Raises:
            StoreUnavailable: nothing is written any more.
        """
        here: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._put((time.monotonic(), here))
        while not here.done():
            if self.task.given_up:
                raise StoreUnavailable("the task that writes to the session store has ended")
            await asyncio.wait([here], timeout=1.0)

    @property
    def behind(self) -> int:
        """Writes that are not done yet."""
        return self._waiting.total()

    @property
    def age(self) -> float:
        """Seconds for which the oldest write has waited; 0 where none does."""
        oldest = self._taken if self._taken is not None else self._queue[0][0] if self._queue else None
        return 0.0 if oldest is None else time.monotonic() - oldest

    def has(self, key: SessionKey) -> bool:
        """Whether the record of this session lacks something that memory has."""
        return key in self._waiting or key in self._given_up

    def _enqueue(self, item: Write | Append) -> None:
        self._waiting[item.key] += 1
        self.characters += item.size
        self._put((time.monotonic(), item))

    def _put(self, item: tuple[float, Write | Append | asyncio.Future[None]]) -> None:
        self._queue.append(item)
        self._more.set()

    async def _write_all(self) -> None:
        while True:
            while not self._queue:
                self._more.clear()
                await self._more.wait()
            self._taken, item = self._queue.popleft()
            if isinstance(item, asyncio.Future):
                self._taken = None
                if not item.done():
                    item.set_result(None)
                continue
            taken: Sequence[Write | Append] = [item]
            try:
                if isinstance(item, Append):
                    taken = batch = self._batch(item)
                    await self._write_batch(batch)
                elif item.removes:
                    taken = removals = self._removals(item)
                    await self._remove(removals)
                else:
                    await self._write(item)
            except Exception:
                # A later write would leave a gap in the record.
                self._given_up.update(one.key for one in taken)
                raise
            finally:
                self._taken = None
                for one in taken:
                    self._done(one)

    def _batch(self, first: Append) -> list[Append]:
        """The append and those that wait directly behind it, as many as one transaction takes."""
        batch, size = [first], first.size
        while self._queue and len(batch) < BATCH and size < BATCH_CHARACTERS:
            following = self._queue[0][1]
            if not isinstance(following, Append):
                break
            self._queue.popleft()
            batch.append(following)
            size += following.size
        return batch

    def _removals(self, first: Write) -> list[Write]:
        """The removal and those that wait directly behind it: SQLite's log is emptied once for all of them."""
        removals = [first]
        while self._queue and len(removals) < BATCH:
            following = self._queue[0][1]
            if not (isinstance(following, Write) and following.removes):
                break
            self._queue.popleft()
            removals.append(following)
        return removals

    def _done(self, item: Write | Append) -> None:
        self.characters -= item.size
        self._waiting[item.key] -= 1
        if not self._waiting[item.key]:
            del self._waiting[item.key]

    async def _write_batch(self, batch: Sequence[Append]) -> None:
        """Append all of it; where the store refuses that, each by itself, so that one costs no other."""
        taken = [append for append in batch if append.key not in self._given_up]
        if len(taken) > 1:
            tried = _Tried()
            try:
                await tried(partial(self._append, taken))
                return
            except Exception as error:  # whatever one append fails of, the others are to be written
                if not isinstance(error, StoreRefused):
                    logger.debug("a batch of appends failed; each is written by itself", exc_info=error)
            repeated = tried.count > 1
        else:
            repeated = False
        for append in taken:
            await self._write(Write(append.key, partial(self._append, [append])), repeated)

    async def _remove(self, removals: Sequence[Write]) -> None:
        """Remove sessions together; where that fails, each by itself."""
        if len(removals) == 1:
            await self._write(removals[0])
            return
        keys = [removal.key for removal in removals]
        try:
            await self._store.delete(*keys)
        except Exception as error:  # whatever one of them fails of, the others are to be removed
            logger.debug("several removals failed; each is done by itself", exc_info=error)
            for removal in removals:
                await self._write(removal)
        else:
            self._given_up.difference_update(keys)

    async def _append(self, appends: Sequence[Append]) -> None:
        await self._store.append_all(appends)

    async def _write(self, write: Write, repeated: bool = False) -> None:
        """Do one write. `repeated`: it was tried before, and may be on record although that seemed to fail."""
        if write.key in self._given_up and not write.removes:
            return
        tried = _Tried()
        with bind_session(write.key):
            try:
                await tried(write.do)
            except StoreRefused as error:
                if error.duplicate and (repeated or tried.count > 1):
                    return  # the first try was stored, and only its acknowledgement was lost
                self._give_up(write.key, "the session store refused a write", error)
                return
            except Exception as error:  # unknown: as bad as a refusal for this session, and for no other
                self._give_up(write.key, "a write failed unexpectedly", error, trace=True)
                return
        if write.removes:
            self._given_up.discard(write.key)

    def _give_up(self, key: SessionKey, why: str, error: Exception, trace: bool = False) -> None:
        self._given_up.add(key)
        logger.error(
            "%s; this session continues in memory only and will not survive a restart: %s",
            why,
            error if isinstance(error, StoreRefused) else type(error).__name__,
            exc_info=error if trace else None,
        )


class _Tried:
    """Tries again while the database is away; counts the tries."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self, do: Callable[[], Awaitable[object]]) -> None:
        attempts = AsyncRetrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_exponential(multiplier=0.1, max=5),
            before_sleep=_say_once,
            reraise=True,
        )
        async for attempt in attempts:
            self.count = attempt.retry_state.attempt_number
            with attempt:
                await do()


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help."""
    return isinstance(error, StoreUnavailable) and not isinstance(error, StoreRefused)


def _say_once(state: RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome is not None:
        logger.warning(
            "the session store did not take a write; it is tried again, and later writes wait: %s",
            state.outcome.exception(),
        )
