"""One server for one record: the lease on it, and on its part of the adapter root.

Guarantees: while one process of ours serves from a record no other begins to, wherever it runs for PostgreSQL,
and on the machines that share the file's locks for SQLite; a lease ends with its process; one that PostgreSQL
gave to another server, after an outage, ends this one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path

from soma_vllm.adapters.store.atomic_files import locked_alone
from soma_vllm.errors import InUse, StoreUnavailable
from soma_vllm.sessions.sql.connections import parse, told
from soma_vllm.sessions.sql.lease import AdvisoryLease

logger = logging.getLogger(__name__)

GRACE_S = 5.0
"""Longest wait for what a killed server leaves: its engine's process ends a moment after it."""
LOOK_EVERY_S = 0.1
KEEP_EVERY_S = 5.0

Take = Callable[[], AbstractContextManager[None]]


@asynccontextmanager
async def leased(
    url: str, wait: Callable[[str], None] | None = None, lost: Callable[[], None] = lambda: None
) -> AsyncIterator[None]:
    """Hold the lease on a record.

    `wait` is told once why this waits, for as long as another server lives; without it that is refused. `lost`
    is called when another server has taken a lease over that an outage of PostgreSQL ended.

    Raises:
        InUse: another server lives on this record.
        StoreUnavailable: the database does not answer.
    """
    parsed = parse(url)
    problem = f"{told(parsed)}: found another server on this record; expected none"
    async with AsyncExitStack() as held:
        if parsed.get_backend_name() != "sqlite":
            lease = AdvisoryLease(url)
            held.push_async_callback(lease.close)

            async def take() -> None:
                if not await lease.take():
                    raise InUse(problem)

            await _patiently(take, wait)
            keeper = asyncio.create_task(_keep(lease, lost), name="soma-record-lease")
            held.callback(keeper.cancel)
        elif parsed.database and parsed.database != ":memory:":
            file = Path(f"{Path(parsed.database).resolve()}.lock")
            await entered(held, lambda: locked_alone(file, problem), wait)
        yield


async def entered(held: AsyncExitStack | ExitStack, take: Take, wait: Callable[[str], None] | None) -> None:
    """Take a lease that is a block, until `held` ends. Raises as `leased` does."""

    async def enter() -> None:
        held.enter_context(take())

    await _patiently(enter, wait)


async def _patiently(take: Callable[[], Awaitable[None]], wait: Callable[[str], None] | None) -> None:
    """Try until a lease is granted; at least for `GRACE_S`, longer where `wait` is told so."""
    deadline, waiting = time.monotonic() + GRACE_S, False
    while True:
        try:
            return await take()
        except InUse as error:
            if time.monotonic() >= deadline and not waiting:
                if wait is None:
                    raise
                wait(str(error))
                waiting = True
        await asyncio.sleep(LOOK_EVERY_S)


async def _keep(lease: AdvisoryLease, lost: Callable[[], None]) -> None:
    """Take the lease again after an outage, before another server does."""
    while True:
        await asyncio.sleep(KEEP_EVERY_S)
        try:
            if not await lease.kept():
                logger.error("another server took this record over while PostgreSQL was away; this one stops")
                lost()
                return
        except StoreUnavailable as error:
            logger.warning("the lease on the record is tried again in %g s: %s", KEEP_EVERY_S, error)
