"""Care for sessions outside any request: an administrator's orders, removal and retention.

Guarantees: a session is removed in one order, so that nobody is answered by what is going: it is closed, its
work ends, its requests end, its adapter leaves the engine, its record and text are deleted, and its tenant's
cached prefixes become unreachable. A failure on the way leaves it closed; the next sweep, or the next start,
removes the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress

from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.adapters.store.protocol import Shelf
from soma_vllm.config import Config
from soma_vllm.engines.engine import Salts
from soma_vllm.errors import AdapterError, BadRequest, NotFound, SomaError, StoreUnavailable, TooManyRequests
from soma_vllm.maintenance.adapter_eviction import AdapterEvictor
from soma_vllm.maintenance.recovery import Recovery
from soma_vllm.maintenance.sweeper import SweepTrigger
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.ports import Meter, Store
from soma_vllm.sessions.registry import Entry, SessionRegistry
from soma_vllm.sessions.sql.records import Summary
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import AdapterRef, Event, Role, SessionKey

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0
SWEPT_AT_ONCE = 200
"""Sessions that one sweep removes at most."""

LAST_REQUEST_S = 600.0
"""Longest wait for the requests of a session that is being removed."""

WRITTEN_S = 30.0
"""Longest wait for a removal to be on record."""

ADAPTER_RETRY_S = 60.0
ASKED = "asked by an administrator"


class SessionAdmin:
    """Looks after sessions."""

    def __init__(
        self,
        config: Config,
        registry: SessionRegistry,
        store: Store,
        adaptation: Adaptation,
        background: BackgroundTasks,
        adapter_store: Shelf,
        salts: Salts,
        meter: Meter,
        adapters: AdapterEvictor,
        sweep_trigger: SweepTrigger,
        sweep_every_s: float = SWEEP_EVERY_S,
    ) -> None:
        self._config = config
        self._registry = registry
        self._store = store
        self._adaptation = adaptation
        self._background = background
        self._adapter_store = adapter_store
        self._salts = salts
        self._meter = meter
        self.adapters = adapters
        self._sweep_trigger = sweep_trigger
        self._sweep_every_s = sweep_every_s
        self._sweeper: asyncio.Task[None] | None = None
        self._removals: dict[SessionKey, asyncio.Task[None]] = {}
        self._recovery = Recovery(registry, store, adapter_store, adaptation, background, self._remove_whole)

    # -- looking ----------------------------------------------------------------------------------------

    async def entry(self, key: SessionKey) -> Entry:
        """A session with its events; raises NotFound, StoreUnavailable."""
        return await self._registry.entry(key)

    def idle(self, key: SessionKey) -> bool:
        """True when no background work is under way for this session."""
        return self._background.idle(key)

    async def summaries(self, tenant: str | None, limit: int, after: float | None) -> list[Summary]:
        """Sessions on record, the most recent first, from those last used before `after` on.

        Raises:
            StoreUnavailable: the session store did not answer.
        """
        return await self._store.summaries(tenant, limit, after)

    # -- orders -----------------------------------------------------------------------------------------

    async def pin(self, key: SessionKey, engine: Role | None) -> Session:
        """Bind a session to an engine, or let it go again. Raises NotFound."""
        async with self._held(key):
            return self._registry.note(key, EventKind.PINNED, engine=engine)

    async def roll_back(self, key: SessionKey) -> Session:
        """Give a session back to the original.

        Raises:
            NotFound: there is no such session.
            BadRequest: the surrogate does not serve it.
        """
        async with self._held(key) as session:
            if session.phase is not Phase.SWITCHED:
                raise BadRequest(f"found the session in phase {session.phase}; expected {Phase.SWITCHED}")
            rolled_back = self._registry.note(key, EventKind.ROLLED_BACK, reason=ASKED)
            self._retire(key, session)
            return rolled_back

    async def readapt(self, key: SessionKey) -> Session:
        """Have a session adapted anew, from all its turns that can teach: at once where their text is at hand,
        else with its next turn.

        Raises:
            NotFound: there is no such session.
            BadRequest: it is being adapted, or removed.
            TooManyRequests: its tenant has as many adapters as its key allows.
        """
        async with self._held(key):
            held = await self._registry.adapters(key.tenant)
            session = self._registry.session(key)
            if session.phase in (Phase.ADAPTING, Phase.CLOSED):
                raise BadRequest(f"found the session in phase {session.phase}; expected another")
            if not self._meter.may_adapt(key.tenant, held - (session.adapter is not None)):
                raise TooManyRequests("limits.adapters: this key's are used up", ADAPTER_RETRY_S)
            restarted = self._registry.note(key, EventKind.RESTARTED, reason=ASKED)
            self._retire(key, session)
            if restarted.wants_adaptation(self._config):
                self._background.spawn(key, self._adaptation.begin(key, None, session.adapting))
            return self._registry.session(key)

    async def remove(self, key: SessionKey) -> None:
        """Remove a session and all it has; one that a client named, with all its branches. Returns when nothing
        of it is left.

        Raises:
            NotFound: there is no such session.
            StoreUnavailable: the session store did not answer; the removal is done when it does.
        """
        async with self._held(key) as session:
            family = await self._registry.family(session)
        for member in family:
            await self._remove_whole(member)
        # What the engines have cached of it cannot be told from what else they have cached for the tenant.
        self._salts.renew(key.tenant)
        try:
            async with asyncio.timeout(WRITTEN_S):
                await self._registry.written()
        except TimeoutError as error:
            raise StoreUnavailable("the removal waits for the session store") from error

    async def _remove_whole(self, key: SessionKey) -> None:
        """Remove one session, once, however many ask for it: each would wait for the others to let it go."""
        task = self._removals.get(key)
        if task is None:
            task = asyncio.create_task(self._remove_one(key), name="soma-removal")
            self._removals[key] = task
            task.add_done_callback(lambda _: self._removals.pop(key, None))
        # A client that leaves ends nothing: others may wait too.
        await asyncio.shield(task)

    async def _remove_one(self, key: SessionKey) -> None:
        if self._registry.is_live(key) and self._registry.is_new(key):
            self._registry.discard(key)  # a branch whose first answer is not over: it is not recorded any more
            return
        async with self._registry.lease(key) as session:
            if self._registry.is_new(key):
                return  # another removal was faster
            if session.phase is not Phase.CLOSED:
                self._registry.note(key, EventKind.CLOSED)
            await self._background.cancel(key)
            await self._registry.unheld(key, LAST_REQUEST_S)
            for ref in _left(self._registry.events(key)):
                await self._adaptation.retire(key, ref)
            with suppress(AdapterError):  # an empty folder stays behind
                await asyncio.to_thread(self._adapter_store.forget, key)
            self._registry.remove(key)

    @asynccontextmanager
    async def _held(self, key: SessionKey) -> AsyncIterator[Session]:
        """A session on record, leased. Raises NotFound, StoreUnavailable."""
        async with self._registry.lease(key) as session:
            if self._registry.is_new(key):
                raise NotFound(f"no session {key.session!r}")
            yield session

    def _retire(self, key: SessionKey, session: Session) -> None:
        if session.adapter is not None:
            self._background.spawn(key, self._adaptation.retire(key, session.adapter))

    # -- by itself --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Take up what a restart interrupted, then keep to the configured retention.

        Raises:
            StoreUnavailable: the session store did not answer.
        """
        await self._recovery.run()
        self._sweeper = asyncio.create_task(self._sweep_for_ever(), name="soma-retention")

    async def stop(self) -> None:
        """End the sweeps and removals; the next start goes on with the latter."""
        tasks = [*self._removals.values(), *([] if self._sweeper is None else [self._sweeper])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.adapters.stop()

    async def sweep(self) -> int:
        """Erase text and remove sessions whose time is over; how many sessions were removed."""
        await self._recovery.finish_removals()
        retention = self._config.retention
        now = time.time()
        if retention.text_ttl_s is not None:
            await self._registry.erasure.erase_before(now - retention.text_ttl_s)
        if retention.session_ttl_s is None:
            return 0
        removed = 0
        for key in await self._store.idle_since(now - retention.session_ttl_s, SWEPT_AT_ONCE):
            if not self._registry.holds(key):
                await self._remove_whole(key)
                removed += 1
        return removed

    async def _sweep_for_ever(self) -> None:
        while True:
            await self._sweep_trigger.wait(self._sweep_every_s)
            try:
                await self.sweep()
                await self.adapters.sweep()
            except AdapterError as error:
                logger.warning("adapters are not looked after: %s", error)
            except SomaError as error:
                logger.warning("retention waits for the session store: %s", error)


def _left(events: Sequence[Event]) -> list[AdapterRef]:
    """Adapters that a session ever had and that were not deleted, as far as its events say."""
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
