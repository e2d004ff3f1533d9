"""What a server does before its first request: make the record and the adapters' files agree again.

A server may be killed between any two steps. What is written comes in the order of the events, and files are
deleted only once the record says that they serve no session, so a kill leaves one of a few things behind.
Guarantees, once `run` has returned: no adapter has files that serves no session, and no half-done training's
are left; no session is served by an adapter whose files are gone; a removal that was under way is complete; an
adaptation that was under way is begun again. Meant for one server per record: what another one is doing at this
moment would look interrupted.
"""

from __future__ import annotations

import logging

from soma_vllm.adaptation.pipeline import Adaptation
from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.errors import AdapterError
from soma_vllm.logs import bind_session
from soma_vllm.maintenance.removal import SessionRemoval
from soma_vllm.sessions.background_tasks import BackgroundTasks
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import AdapterRef

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
        await self._roll_back_where_files_are_gone()
        await self._retire_what_serves_no_session()
        await self._removal.finish_interrupted()
        await self._registry.written()
        interrupted = await self._registry.store.in_phase(Phase.ADAPTING)
        within_s = min(LONGEST_SPREAD_S, SPREAD_S * (len(interrupted) - 1))
        for key in interrupted:
            async with self._registry.lease(key) as session:
                if session.phase is Phase.ADAPTING and session.kept() and self._background.idle(key):
                    self._adaptation.start(key, session.forced, session.adapting, within_s)

    async def _roll_back_where_files_are_gone(self) -> None:
        """Give sessions whose adapter is gone back to the original: they may be adapted again."""
        served = await self._registry.store.served()
        try:
            there = {one.ref.name for one in await self._adapters.stored()}
        except AdapterError as error:
            logger.warning(
                "the adapter store did not answer; a session whose adapter is lost is answered by the original "
                "when its load fails: %s",
                error,
            )
            return
        for key, adapter in served:
            if adapter not in there and (await self._registry.open(key)).phase is Phase.SWITCHED:
                with bind_session(key):
                    logger.warning("the files of adapter %s are gone; the session is rolled back", adapter)
                self._registry.note(key, EventKind.ROLLED_BACK, reason="the files of its adapter are gone")
        await self._registry.written()

    async def _retire_what_serves_no_session(self) -> None:
        """Retire adapters, on record or not, that a kill left between two steps."""
        serving = {adapter for _, adapter in await self._registry.store.served()}
        records = await self._registry.store.adapters(retired=False)
        refs = {record.name: AdapterRef(record.name, record.number, record.path) for record in records}
        try:
            await self._adapters.collect_garbage()
            stored = await self._adapters.stored()
            refs |= {one.ref.name: one.ref for one in stored if one.owner == self._adapters.owner}
        except AdapterError as error:
            logger.warning(
                "the adapter store did not answer; files of unused adapters stay until the next start: %s",
                error,
            )
        for name in sorted(refs.keys() - serving):
            await self._adapters.retire(refs[name])
