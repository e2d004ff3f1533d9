"""What a server does before its first request: make the record and the adapters' files agree again.

A server may be killed between any two steps. What is written comes in the order of the events, and files are
deleted only once the record says that they serve no session, so a kill leaves one of a few things behind.
Guarantees, once `run` has returned: no adapter of this record has files that serves no session, and no
half-done training's are left; all that is known of an adapter of this record is on it; no session is served by
an adapter whose files are gone, or that is another record's; a removal that was under way is complete; an
adaptation that was under way is begun again. For one server per record, which holds a lease on it: what another
one is doing at this moment would look interrupted. The adapter store is looked at as a whole here, once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.adapters.store.manifest import PublishedAdapter
from soma_vllm.errors import AdapterError
from soma_vllm.logs import bind_session
from soma_vllm.maintenance.removal import SessionRemoval
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.adapter_states import AdapterState
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase

logger = logging.getLogger(__name__)

SPREAD_S = 0.1
"""Seconds by which each interrupted adaptation lengthens the time over which all of them begin: users' first
turns come then too."""
LONGEST_SPREAD_S = 60.0


class Recovery:
    """Takes up what a kill interrupted."""

    def __init__(
        self,
        registry: SessionRegistry,
        adapters: AdapterLifecycle,
        adaptation: Adaptation,
        background: BackgroundTasks,
        removal: SessionRemoval,
    ) -> None:
        self._registry = registry
        self._adapters = adapters
        self._adaptation = adaptation
        self._background = background
        self._removal = removal

    async def run(self) -> None:
        """Do all of it; trainings go on in the background.

        Raises:
            StoreUnavailable: the session store does not answer.
        """
        stored = await self._stored()
        if stored is not None:
            await self._index(stored)
            await self._roll_back_where_files_are_gone(stored)
        await self._retire_what_serves_no_session(stored or {})
        await self._removal.finish_interrupted()
        await self._registry.written()
        interrupted = await self._registry.store.in_phase(Phase.ADAPTING)
        within_s = min(LONGEST_SPREAD_S, SPREAD_S * (len(interrupted) - 1))
        for key in interrupted:
            async with self._registry.lease(key) as session:
                if session.phase is Phase.ADAPTING and session.kept() and self._background.idle(key):
                    self._adaptation.start(key, session.forced, session.adapting, within_s)

    async def _stored(self) -> dict[str, PublishedAdapter] | None:
        """What the adapter store has, by name, without what a kill left half done; None where it is away."""
        try:
            await self._adapters.collect_garbage()
            return {one.ref.name: one for one in await self._adapters.stored()}
        except AdapterError as error:
            logger.warning(
                "the adapter store did not answer; files of unused adapters stay until the next start, and a "
                "session whose adapter is lost is answered by the original when its load fails: %s",
                error,
            )
            return None

    async def _index(self, stored: Mapping[str, PublishedAdapter]) -> None:
        """Complete the record of adapters that an older version published."""
        records = await self._registry.store.adapters(retired=False)
        unknown = (record for record in records if record.created is None and record.name in stored)
        await self._registry.store.index([replace(one, **stored[one.name].facts()) for one in unknown])

    async def _roll_back_where_files_are_gone(self, stored: Mapping[str, PublishedAdapter]) -> None:
        """Give sessions whose adapter is gone, or another record's, back to the original: they may be adapted
        again."""
        on_record = {record.name for record in await self._registry.store.adapters()}
        for key, adapter in await self._registry.store.served():
            there = adapter in stored and adapter in on_record
            if not there and (await self._registry.open(key)).phase is Phase.SWITCHED:
                with bind_session(key):
                    logger.warning("the files of adapter %s are gone; the session is rolled back", adapter)
                self._registry.note(key, EventKind.ROLLED_BACK, reason="the files of its adapter are gone")
        await self._registry.written()

    async def _retire_what_serves_no_session(self, stored: Mapping[str, PublishedAdapter]) -> None:
        """Retire adapters of this record, named by it or not, that a kill left between two steps."""
        serving = {adapter for _, adapter in await self._registry.store.served()}
        records = await self._registry.store.adapters()
        known = {record.name for record in records}
        refs = {record.name: record.ref for record in records if record.state != AdapterState.RETIRED}
        own = (one.ref for one in stored.values() if one.owner == self._adapters.owner or one.ref.name in known)
        refs |= {ref.name: ref for ref in own}
        for name in sorted(refs.keys() - serving):
            await self._adapters.retire(refs[name])
