"""Removing a session and everything it has.

Guarantees: a session is removed in one order, so that no request is answered by what is going: it is closed,
its background work ends, its requests end, its adapters are retired, its record and text are deleted, and its
tenant's cached prefixes become unreachable. A failure on the way leaves it closed; the next sweep, or the next
start, removes the rest.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.engines.engine import Salts
from soma_vllm.errors import AdapterError, NotFound, StoreUnavailable
from soma_vllm.logs import bind_session
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import AdapterRef, Event, SessionKey

logger = logging.getLogger(__name__)

LAST_REQUEST_S = 600.0
"""Longest wait for the requests of a session that is being removed."""

LOADED_AT_ONCE = 16
"""Sessions that are read from the store at the same time to be removed: each has its few seconds to itself."""

WRITTEN_S = 30.0
"""Longest wait for a removal to be on record."""


class SessionRemoval:
    """Removes sessions."""

    def __init__(
        self,
        registry: SessionRegistry,
        background: BackgroundTasks,
        adapters: AdapterLifecycle,
        salts: Salts,
    ) -> None:
        self._registry = registry
        self._background = background
        self._adapters = adapters
        self._salts = salts
        self._removals: dict[SessionKey, asyncio.Task[None]] = {}
        self._loading = asyncio.Semaphore(LOADED_AT_ONCE)
        self._families: dict[SessionKey, asyncio.Task[None]] = {}

    async def remove_family(self, key: SessionKey, wait_s: float = LAST_REQUEST_S) -> bool:
        """Remove a session that a client named, with all its branches; True once nothing of it is left, False
        where that takes longer than `wait_s` seconds: it goes on, whatever becomes of the caller.

        Raises:
            NotFound: there is no such session.
            StoreUnavailable: the session store does not answer; the removal is done when it does.
        """
        task = self._families.get(key)
        if task is None:
            task = self._families[key] = asyncio.create_task(self._remove_family(key), name="soma-removal")
            task.add_done_callback(partial(self._family_done, key))
        await asyncio.wait([task], timeout=wait_s)
        if not task.done():
            return False
        task.result()
        return True

    def _family_done(self, key: SessionKey, task: asyncio.Task[None]) -> None:
        del self._families[key]
        error = None if task.cancelled() else task.exception()
        if error is not None and not isinstance(error, NotFound):
            with bind_session(key):
                logger.info("the removal of a session is not complete: %s", error)

    async def _remove_family(self, key: SessionKey) -> None:
        async with self._registry.lease(key) as session:
            if self._registry.is_new(key):
                raise NotFound(f"no session {key.session!r}")
            family = await self._registry.family(session)
        for member in family:
            await self.remove(member)
        # What the engines have cached of it cannot be told from what else they have cached for the tenant.
        self._salts.renew(key.tenant)
        try:
            async with asyncio.timeout(WRITTEN_S):
                await self._registry.written()
        except TimeoutError as error:
            raise StoreUnavailable("the removal waits for the session store") from error

    async def remove(self, key: SessionKey) -> None:
        """Remove one session, once, however many ask for it: each would wait for the others' leases to end."""
        # A client that disconnects ends nothing: others may wait too.
        await asyncio.shield(self.begin(key))

    def begin(self, key: SessionKey) -> asyncio.Task[None]:
        """Begin to remove one session, or the removal that is under way."""
        task = self._removals.get(key)
        if task is None:
            with bind_session(key):
                task = asyncio.create_task(self._remove(key), name="soma-removal")
            self._removals[key] = task
            task.add_done_callback(lambda _: self._removals.pop(key, None))
        return task

    async def finish_interrupted(self) -> None:
        """Remove what is closed and still on record. Raises StoreUnavailable."""
        await asyncio.gather(*map(self.remove, await self._registry.store.in_phase(Phase.CLOSED)))

    async def stop(self) -> None:
        """End the removals under way; the next start finishes them."""
        tasks = [*self._families.values(), *self._removals.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _remove(self, key: SessionKey) -> None:
        if self._registry.is_live(key) and self._registry.is_new(key):
            self._registry.discard(key)  # a branch whose first answer is not over: it is not recorded any more
            return
        async with self._loading:
            await self._registry.open(key)
        async with self._registry.lease(key) as session:
            if self._registry.is_new(key):
                return  # removed by another request
            if session.phase is not Phase.CLOSED:
                self._registry.note(key, EventKind.CLOSED)
            await self._background.cancel(key)
            await self._registry.unheld(key, LAST_REQUEST_S)
            for ref in adapters_left(self._registry.events(key)):
                await self._adapters.retire(ref, key)
            with suppress(AdapterError):  # an empty folder stays behind
                await self._adapters.forget_session(key)
            self._registry.remove(key)


def adapters_left(events: Sequence[Event]) -> list[AdapterRef]:
    """Adapters that a session ever had and that were not retired, as far as its events say."""
    refs: dict[str, AdapterRef] = {}
    for event in events:
        found = event.data.get("adapter")
        if not isinstance(found, dict):
            continue
        if event.kind == EventKind.ADAPTER_RETIRED:
            refs.pop(found["name"], None)
        else:
            refs[found["name"]] = AdapterRef(**found)
    return list(refs.values())
