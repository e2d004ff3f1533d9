"""The life of a published adapter: publish, load, lease, retire. Nothing else ends one.

Guarantees:

* What is published is verified, and recorded as published before anything uses it.
* An adapter is in the engine while a lease on it is held.
* It is retired in one order: everything decided so far is on record, no session is served by it, no new lease
  is granted, its last token is out, it leaves the engine, its files are deleted, and that is recorded. After a
  failure on the way the next try does the rest, or the next start (`maintenance.recovery`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.slots import SlotRequest
from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.errors import AdapterError, AdapterRejected, EngineError, NotFound, StoreUnavailable
from soma_vllm.sessions.state.adapter_states import AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import AdapterRef, SessionKey

logger = logging.getLogger(__name__)

RECORD_S = 10.0
"""Longest wait for the record before an adapter's files are deleted; after it the next start deletes them."""


class AdapterRecords(Protocol):
    """Who is served by an adapter, and what is recorded of it: `sessions.registry.SessionRegistry`."""

    def note(self, key: SessionKey, kind: EventKind, /, **data: Any) -> Any: ...
    def adapter_state(self, name: str) -> AdapterState | None: ...
    async def in_use(self, ref: AdapterRef) -> bool: ...
    async def written(self) -> None: ...
    async def retired(self, adapter: str) -> None: ...


class AdapterServing(Protocol):
    """The engine that serves adapters: `engines.surrogate.SurrogateEngine`."""

    name: str

    async def load(self, ref: AdapterRef) -> None: ...
    async def unload(self, ref: AdapterRef) -> None: ...
    def prefetch(self, ref: AdapterRef) -> None: ...


class AdapterLifecycle:
    """Publishes, loads, leases and retires adapters."""

    def __init__(
        self, store: AdapterStore, engine: AdapterServing, leases: AdapterLeases, records: AdapterRecords
    ) -> None:
        self._store = store
        self._engine = engine
        self._leases = leases
        self._records = records
        self._retiring: set[str] = set()
        # The same after every restart, and another for servers of another session store.
        self._trainings = f"soma-train-{hashlib.sha256(store.owner.encode()).hexdigest()[:12]}-"

    # -- publish ----------------------------------------------------------------------------------------

    def workplace(self) -> str:
        """A new empty directory to train in."""
        return tempfile.mkdtemp(prefix=self._trainings)

    async def publish(
        self, key: SessionKey, trained: Path, manifest: Mapping[str, Any], made: list[AdapterRef]
    ) -> AdapterRef:
        """Verify and publish a trainer's files as the session's next adapter.

        It is put into `made` before it is recorded: the caller retires what is in there, whatever fails.

        Raises:
            AdapterRejected: the files are not fit to be loaded.
            AdapterError: the store cannot be written; nothing was published.
        """
        published = await asyncio.to_thread(
            self._store.publish, key, trained, base_model=self._engine.name, manifest=manifest
        )
        ref = published.ref
        made.append(ref)
        self._records.note(key, EventKind.ADAPTER_PUBLISHED, adapter=asdict(ref))
        return ref

    async def prove(self, key: SessionKey, ref: AdapterRef) -> None:
        """Load a new adapter into the engine, which must serve it as it was trained.

        Raises:
            EngineError: the engine did not load it.
            AdapterRejected: the engine does not serve what was trained.
        """
        try:
            async with self._leases.background(ref.name):
                await self._engine.load(ref)
        except AdapterRejected as error:
            problems = list(error.problems)
            self._records.note(key, EventKind.ADAPTER_REJECTED, adapter=asdict(ref), problems=problems)
            raise
        self._records.note(key, EventKind.ADAPTER_LOADED, adapter=asdict(ref))

    # -- lease ------------------------------------------------------------------------------------------

    def prefetch(self, ref: AdapterRef) -> None:
        """Begin to load an adapter that a request will need, where a slot is free."""
        if self._leases.can_acquire(ref.name):
            self._engine.prefetch(ref)

    async def acquire(self, ref: AdapterRef) -> SlotRequest:
        """A user's lease on a loaded adapter; give it back with `release`.

        Raises:
            EngineError: no slot is free, or the adapter does not load.
            AdapterRejected: the engine does not serve what was trained.
        """
        lease = await self._leases.acquire(ref.name)
        try:
            await self._engine.load(ref)
        except BaseException:
            await self._leases.release(lease)
            raise
        return lease

    async def release(self, lease: SlotRequest) -> None:
        """Give a lease back."""
        await self._leases.release(lease)

    @asynccontextmanager
    async def background(self, ref: AdapterRef | None) -> AsyncIterator[None]:
        """A lease on a loaded adapter for work that no user waits for; None needs none.

        Raises:
            EngineError, AdapterRejected: as in `acquire`.
        """
        if ref is None:
            yield
            return
        async with self._leases.background(ref.name):
            await self._engine.load(ref)
            yield

    # -- retire -----------------------------------------------------------------------------------------

    async def retire(self, ref: AdapterRef, key: SessionKey | None = None) -> bool:
        """End an adapter, unless a session is served by it; True where it is gone.

        `key` is a live session that the end is recorded for; without one it goes into the adapter's own record.
        """
        if key is not None and self._records.adapter_state(ref.name) is AdapterState.RETIRED:
            return True
        if ref.name in self._retiring:
            return False
        self._retiring.add(ref.name)
        try:
            if not await self._on_record(ref) or await self._records.in_use(ref):
                return False
            if key is not None:
                self._records.note(key, EventKind.ADAPTER_DRAINING, adapter=asdict(ref))
            if not await self._withdraw(ref):
                return False
            if key is not None:
                self._records.note(key, EventKind.ADAPTER_RETIRED, adapter=asdict(ref))
            else:
                await self._records.retired(ref.name)
            return True
        finally:
            self._retiring.discard(ref.name)

    async def _withdraw(self, ref: AdapterRef) -> bool:
        """Take an adapter out of the engine once its last token is out, then delete its files."""
        await self._leases.drain(ref.name)
        try:
            await self._engine.unload(ref)
            with suppress(NotFound):  # deleted by hand
                await asyncio.to_thread(self._store.retire, ref.name)
        except (EngineError, AdapterError) as error:
            logger.warning(
                "adapter %s is not retired; a sweep or the next start tries again: %s", ref.name, error
            )
            return False
        self._leases.forget(ref.name)
        return True

    async def _on_record(self, ref: AdapterRef) -> bool:
        """Whether all that was decided so far is on record. Only then may files go: a server that is killed
        before would come back to a session whose adapter is gone, and `in_use` would count sessions that were
        removed."""
        try:
            async with asyncio.timeout(RECORD_S):
                await self._records.written()
        except (TimeoutError, StoreUnavailable):
            logger.warning(
                "the session store did not answer within %g s; adapter %s stays until the next sweep or start",
                RECORD_S,
                ref.name,
            )
            return False
        return True

    # -- what is stored ---------------------------------------------------------------------------------

    @property
    def owner(self) -> str:
        """Written into everything that servers of this session store publish."""
        return self._store.owner

    async def stored(self, tenant: str | None = None) -> Sequence[PublishedAdapter]:
        """What is published under the root, of one tenant or of all. Raises AdapterError."""
        return await asyncio.to_thread(self._store.list, tenant)

    async def find(self, name: str) -> PublishedAdapter:
        """The published adapter of that name. Raises NotFound, AdapterError."""
        return await asyncio.to_thread(self._store.get, name)

    async def pins(self) -> frozenset[str]:
        """Adapters that are never evicted. Raises AdapterError."""
        return await asyncio.to_thread(self._store.pins)

    async def forget_session(self, key: SessionKey) -> None:
        """Remove a session's empty folder. Raises AdapterError."""
        await asyncio.to_thread(self._store.forget, key)

    async def collect_garbage(self) -> None:
        """Delete what killed trainings and publications left; none may be under way. Raises AdapterError."""
        await asyncio.to_thread(self._clear)

    def _clear(self) -> None:
        for left in Path(tempfile.gettempdir()).glob(f"{self._trainings}*"):
            shutil.rmtree(left, ignore_errors=True)
        self._store.collect_garbage()
