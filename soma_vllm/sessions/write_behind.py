"""The write-behind queue: everything that goes to the session store, in order; no request waits for it.

Guarantees: while the database is away, or its disk is full, writes wait and are tried again. A session whose
write is refused is given up alone; what is on record of it has no gaps, because nothing is written after one.
A kill costs each session at most the writes that were still queued, the latest ones. `stop` ends within its
limit whatever the database does.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential

from soma_vllm.errors import StoreRefused, StoreUnavailable
from soma_vllm.logs import bind_session
from soma_vllm.types import SessionKey

logger = logging.getLogger(__name__)

STOP_LIMIT_S = 10.0
"""Longest wait for the last writes when the server stops."""


@dataclass(frozen=True)
class Write:
    """One thing to do to the store for one session."""

    key: SessionKey
    do: Callable[[], Awaitable[object]]
    anew: bool = False
    """May be applied although earlier writes of this session were lost: a removal."""


class WriteBehindQueue:
    """Does one write after another."""

    def __init__(self, stop_limit_s: float = STOP_LIMIT_S) -> None:
        self._stop_limit_s = stop_limit_s
        self._writes: asyncio.Queue[Write | asyncio.Future[None]] = asyncio.Queue()
        self._waiting: Counter[SessionKey] = Counter()
        self._given_up: set[SessionKey] = set()
        self._writer: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin writing, once: two writers would not keep the order."""
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="soma-session-writer")

    async def stop(self) -> None:
        """Write what is still to be written, then end."""
        if self._writer is None:
            return
        written = asyncio.ensure_future(self._writes.join())
        either = asyncio.FIRST_COMPLETED
        await asyncio.wait([written, self._writer], timeout=self._stop_limit_s, return_when=either)
        if self.behind:
            logger.error(
                "the session store did not take all writes within %g s; %d writes are lost, and with them the "
                "latest turns of their sessions",
                self._stop_limit_s,
                self.behind,
            )
        written.cancel()
        self._writer.cancel()

    def put(self, write: Write) -> None:
        """Queue a write."""
        self._waiting[write.key] += 1
        self._writes.put_nowait(write)

    async def written(self) -> None:
        """Return when everything queued before the call is done."""
        here = asyncio.get_running_loop().create_future()
        self._writes.put_nowait(here)
        await here

    @property
    def behind(self) -> int:
        """Writes that are not done yet."""
        return self._waiting.total()

    def has(self, key: SessionKey) -> bool:
        """Whether the record of this session lacks something that memory has."""
        return key in self._waiting or key in self._given_up

    async def _write_all(self) -> None:
        while True:
            item = await self._writes.get()
            try:
                if isinstance(item, Write):
                    with bind_session(item.key):
                        await self._write(item)
                elif not item.done():
                    item.set_result(None)
            finally:
                if isinstance(item, Write):
                    self._waiting.subtract([item.key])
                    if not self._waiting[item.key]:
                        del self._waiting[item.key]
                self._writes.task_done()

    async def _write(self, write: Write) -> None:
        if write.key in self._given_up and not write.anew:
            return
        attempts = AsyncRetrying(
            retry=retry_if_exception(_may_pass),
            wait=wait_exponential(multiplier=0.1, max=5),
            before_sleep=_say_once,
            reraise=True,
        )
        tried = 0
        try:
            async for attempt in attempts:
                tried = attempt.retry_state.attempt_number
                with attempt:
                    await write.do()
        except StoreRefused as error:
            if error.duplicate and tried > 1:
                return  # the first try was stored, and only its acknowledgement was lost
            self._given_up.add(write.key)
            logger.error(
                "the session store refused a write; this session continues in memory only and will not "
                "survive a restart: %s",
                error,
            )
            return
        if write.anew:
            self._given_up.discard(write.key)


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help."""
    return isinstance(error, StoreUnavailable) and not isinstance(error, StoreRefused)


def _say_once(state: RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome is not None:
        logger.warning(
            "the session store did not take a write; it is tried again, and later writes wait: %s",
            state.outcome.exception(),
        )
