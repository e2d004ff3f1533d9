"""What a server does before its first request: make the record and the adapters' files agree again.

A server may be killed between any two steps. What is written comes in the order of the events, and files go
only once the record says that nobody is served by them, so a kill leaves one of a few things behind.
Guarantees, once `run` has returned: no adapter's files are there that no session is served by, and no half-done
training's; no session is served by an adapter whose files are gone; a removal that was under way is complete;
an adaptation that was under way is begun again. Meant for one server per record: what another one is doing this
moment would look interrupted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.adapters.store.protocol import Shelf
from soma_vllm.errors import AdapterError
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.ports import Store
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import SessionKey

logger = logging.getLogger(__name__)


class Recovery:
    """Takes up what a kill interrupted."""

    def __init__(
        self,
        registry: SessionRegistry,
        store: Store,
        adapter_store: Shelf,
        adaptation: Adaptation,
        background: BackgroundTasks,
        remove: Callable[[SessionKey], Awaitable[None]],
    ) -> None:
        """`remove` removes one session whole."""
        self._registry = registry
        self._store = store
        self._adapter_store = adapter_store
        self._adaptation = adaptation
        self._background = background
        self._remove = remove

    async def run(self) -> None:
        """Do all of it; trainings go on in the background.

        Raises:
            StoreUnavailable: the session store did not answer.
        """
        await self._end_what_has_no_files()
        await self._delete_what_serves_nobody()
        await self.finish_removals()
        await self._registry.written()
        for key in await self._store.in_phase(Phase.ADAPTING):
            session = await self._registry.open(key)
            if session.phase is Phase.ADAPTING and session.kept() and self._background.idle(key):
                self._background.spawn(key, self._adaptation.begin(key, session.forced, session.adapting))

    async def finish_removals(self) -> None:
        """Remove what is closed and still on record."""
        for key in await self._store.in_phase(Phase.CLOSED):
            await self._remove(key)

    async def _end_what_has_no_files(self) -> None:
        """Give sessions whose adapter is gone back to the original: they may be adapted again."""
        served = await self._store.served()
        try:
            there = {one.ref.name for one in await asyncio.to_thread(self._adapter_store.list)}
        except AdapterError as error:
            logger.warning("it is not known which adapters have files: %s", error)
            return
        for key, adapter in served:
            if adapter not in there and (await self._registry.open(key)).phase is Phase.SWITCHED:
                logger.warning("a session goes back to the original: its adapter %s has no files", adapter)
                self._registry.note(key, EventKind.ROLLED_BACK, reason="the files of its adapter are gone")
        await self._registry.written()

    async def _delete_what_serves_nobody(self) -> None:
        """Delete adapters, on record or not, that a kill left between two steps."""
        serving = {adapter for _, adapter in await self._store.served()}
        on_record = {record.name for record in await self._store.adapters(retired=False)}
        there: set[str] = set()
        try:
            await asyncio.to_thread(self._adapter_store.clear)
            listed = await asyncio.to_thread(self._adapter_store.list)
            there = {one.ref.name for one in listed if one.owner == self._adapter_store.owner}
        except AdapterError as error:
            logger.warning("adapters that serve nobody are not looked for: %s", error)
        for name in sorted((there | on_record) - serving):
            try:
                await asyncio.to_thread(self._adapter_store.retire, name)
            except AdapterError as error:
                logger.warning("adapter %s serves nobody and could not be deleted: %s", name, error)
                continue
            if name in on_record:
                await self._store.retired(name)
