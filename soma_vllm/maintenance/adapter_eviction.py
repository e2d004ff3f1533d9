"""Keeps stored adapters within their budgets, and does what an administrator asks of them.

Guarantees:

* What has to go is decided by `eviction_policy.py` from the record, the pins, and the last use of each adapter:
  its sessions' last append on record, so that it survives restarts and costs no writing. The adapter store is
  looked through only by `collect`.
* An adapter goes in one order: its sessions are given back to the original (`adapter_evicted`), its last tokens
  come out, it leaves the engine, its files are deleted. They may be adapted again.
* An adapter whose files are missing or damaged serves no session: its sessions go back to the original.
* An adapter that an adaptation under way made is left to that. What other records published under the same
  root counts in no budget, and is never deleted.
* While the session store is away nothing is evicted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import asdict
from typing import Any

from soma_vllm.adapters.eviction_policy import Eviction, Reason, StoredAdapter, to_evict
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.adapters.store.manifest import listed_view
from soma_vllm.adapters.store.protocol import AdapterStoreMeter
from soma_vllm.config import Adapters
from soma_vllm.errors import NotFound, SomaError
from soma_vllm.logs import bind_session
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.sql.records import AdapterRecord
from soma_vllm.sessions.state.adapter_states import IN_THE_MAKING, AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import AdapterRef, SessionKey

logger = logging.getLogger(__name__)

ORPHAN_AFTER_S = 600.0
"""Age in seconds from which an adapter of ours that serves no session is taken for one that a kill left."""

LAST_TOKEN_S = 30.0
"""Longest time that a sweep waits for evicted adapters to be gone; they go on going by themselves."""


class AdapterEvictor:
    """Looks after adapters."""

    def __init__(
        self,
        budgets: Adapters,
        registry: SessionRegistry,
        adapters: AdapterLifecycle,
        sweep_trigger: SweepTrigger,
        meter: AdapterStoreMeter,
        orphan_after_s: float = ORPHAN_AFTER_S,
    ) -> None:
        self._budgets = budgets
        self._registry = registry
        self._adapters = adapters
        self._sweep_trigger = sweep_trigger
        self._meter = meter
        self._orphan_after_s = orphan_after_s
        self._going: dict[str, asyncio.Task[None]] = {}

    # -- looking ----------------------------------------------------------------------------------------

    async def listed(self, tenant: str | None = None) -> list[dict[str, Any]]:
        """This record's adapters as an administrator sees them, the most recently used first.

        Raises:
            StoreUnavailable: the session store does not answer.
            AdapterError: the adapter store does not.
        """
        used, records = await self._on_record()
        pins = await self._adapters.pins()
        rows = [
            self._view(one, used, pins)
            for one in self._kept(records)
            if tenant is None or one.key.tenant == tenant
        ]
        return sorted(rows, key=lambda row: -float(row["last_used"]))

    async def show(self, tenant: str | None, name: str) -> dict[str, Any]:
        """One adapter. Raises NotFound as well: there is none of this name, or it is another tenant's."""
        record = await self._find(name)
        if tenant is not None and record.key.tenant != tenant:
            raise NotFound(f"no adapter {name!r}")
        used, _ = await self._on_record()
        users = [key.session for key in await self._registry.users_of(name)]
        return {**self._view(record, used, await self._adapters.pins()), "serves": users}

    # -- orders -----------------------------------------------------------------------------------------

    async def remove(self, name: str) -> None:
        """Evict one adapter, pinned or not; returns when it is gone.

        Raises:
            NotFound: there is no such adapter.
            SomaError: it could not be retired now; no session is served by it any more.
        """
        record = await self._find(name)
        # Not awaited itself: an administrator who leaves does not stop it half way.
        await asyncio.wait([self._begin(record.ref, Reason.ASKED)])
        with suppress(NotFound):
            await self._adapters.find(name)
            raise SomaError(f"adapter {name} serves no session, but could not be deleted yet; the log says why")

    async def sweep(self) -> int:
        """Evict what has to go; how many adapters.

        Raises:
            StoreUnavailable: the session store does not answer.
            AdapterError: the adapter store does not.
        """
        damaged = self._sweep_trigger.take_damaged()
        used, records = await self._on_record()
        pins = await self._adapters.pins()
        kept = self._kept(records)
        self._meter.kept(len(kept), sum(one.size_bytes or 0 for one in kept))
        standing = [one for one in kept if one.name not in self._going]
        wanted = [
            *self._lost(used, records, damaged),
            *await self._unused(standing, used),
            *to_evict(self._judged(standing, used, pins), self._budgets, time.time()),
        ]
        reasons = {one.name: one.reason for one in reversed(wanted) if one.name in records}
        return await self._evicted({records[name].ref: reason for name, reason in reasons.items()})

    async def collect(self) -> int:
        """Sweep, then delete what this record published and does not name: what a kill between publishing and
        recording left. Looks at the whole adapter store. How many adapters; raises as `sweep` does."""
        swept = await self.sweep()
        known = {record.name for record in await self._registry.store.adapters()}
        before = time.time() - self._orphan_after_s
        orphans = [
            one.ref
            for one in await self._adapters.stored()
            if one.owner == self._adapters.owner
            and one.created < before
            and one.ref.name not in known
            and self._registry.adapter_state(one.ref.name) is None
        ]
        return swept + await self._evicted(dict.fromkeys(orphans, Reason.ORPHANED))

    async def _evicted(self, reasons: Mapping[AdapterRef, Reason]) -> int:
        """How many adapters are going now."""
        tasks = [self._begin(ref, reason) for ref, reason in reasons.items()]
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_TOKEN_S)
        return len(tasks)

    async def stop(self) -> None:
        """End what is under way; the next start takes it up."""
        tasks = list(self._going.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- deciding ---------------------------------------------------------------------------------------

    def _kept(self, records: Mapping[str, AdapterRecord]) -> list[AdapterRecord]:
        """Adapters that have files."""
        return [one for one in records.values() if self._state(one) is not AdapterState.RETIRED]

    def _judged(
        self, kept: Sequence[AdapterRecord], used: Mapping[str, float], pins: frozenset[str]
    ) -> list[StoredAdapter]:
        """Kept adapters as the decision sees them."""
        return [
            StoredAdapter(
                one.name,
                one.key.tenant,
                one.size_bytes or 0,
                _last_use(one, used),
                spared=one.name in pins or self._state(one) in IN_THE_MAKING,
            )
            for one in kept
        ]

    def _lost(
        self, used: Mapping[str, float], records: Mapping[str, AdapterRecord], damaged: frozenset[str]
    ) -> list[Eviction]:
        """Adapters that serve sessions, but whose files are gone or damaged."""
        gone = {name for name in used if name in records and records[name].state == AdapterState.RETIRED}
        return [Eviction(name, Reason.LOST) for name in sorted((gone | damaged) - self._going.keys())]

    async def _unused(self, kept: Sequence[AdapterRecord], used: Mapping[str, float]) -> list[Eviction]:
        """Adapters that serve no session and that no adaptation looks after."""
        before = time.time() - self._orphan_after_s
        return [
            Eviction(one.name, Reason.ORPHANED)
            for one in kept
            if one.name not in used
            and (one.created or 0.0) < before
            and self._state(one) not in IN_THE_MAKING
            and not await self._registry.in_use(one.ref)  # it may have switched a moment ago
        ]

    def _state(self, record: AdapterRecord) -> AdapterState:
        """Where an adapter stands: as live sessions say, else as the record does."""
        return self._registry.adapter_state(record.name) or AdapterState(record.state)

    async def _on_record(self) -> tuple[dict[str, float], dict[str, AdapterRecord]]:
        """(last use of each adapter that serves sessions, every adapter's record)."""
        used = await self._registry.store.adapters_used()
        records = await self._registry.store.adapters(retired=False)
        return used, {record.name: record for record in records}

    async def _find(self, name: str) -> AdapterRecord:
        """Raises NotFound where this record has no such adapter, or not any more."""
        found = await self._registry.store.adapter(name)
        if found is None or self._state(found) is AdapterState.RETIRED:
            raise NotFound(f"no adapter {name!r}")
        return found

    def _view(self, record: AdapterRecord, used: Mapping[str, float], pins: frozenset[str]) -> dict[str, Any]:
        """One adapter and what is made of it, as JSON."""
        return {
            **listed_view(record.name, record.number, record.key, vars(record)),
            "last_used": _last_use(record, used),
            "state": self._state(record),
            "pinned": record.name in pins,
        }

    # -- doing ------------------------------------------------------------------------------------------

    def _begin(self, ref: AdapterRef, reason: Reason) -> asyncio.Task[None]:
        """Evict in a task of its own, once."""
        task = self._going.get(ref.name)
        if task is None:
            task = asyncio.create_task(self._evict(ref, reason), name=f"soma-evict-{ref.number}")
            self._going[ref.name] = task
            task.add_done_callback(lambda done: self._ended(ref.name, done))
        return task

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        self._going.pop(name, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("adapter %s is not evicted; the next sweep tries again: %s", name, error)

    async def _evict(self, ref: AdapterRef, reason: Reason) -> None:
        async with AsyncExitStack() as leases:
            users = await self._give_back(ref, reason, leases)
            user = users[0] if users else None
            with nullcontext() if user is None else bind_session(user):
                if await self._adapters.retire(ref, user):
                    self._meter.evicted(reason)
                    logger.info(
                        "adapter %s evicted, its files deleted; %d sessions used it: %s",
                        ref.name,
                        len(users),
                        reason,
                    )

    async def _give_back(self, ref: AdapterRef, reason: Reason, leases: AsyncExitStack) -> list[SessionKey]:
        """Give every session that an adapter serves back to the original, and lease it."""
        users = []
        for key in await self._registry.users_of(ref.name):
            session = await leases.enter_async_context(self._registry.lease(key))
            if session.adapter is not None and session.is_served_by(ref.name):
                users.append(key)
                evicted = asdict(session.adapter)
                self._registry.note(key, EventKind.ADAPTER_EVICTED, adapter=evicted, reason=reason)
        return users


def _last_use(record: AdapterRecord, used: Mapping[str, float]) -> float:
    return max(record.created or 0.0, used.get(record.name, 0.0))
