"""Brings an adapter's files to this machine, and looks at them once, before an engine loads them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

from soma_vllm.adapters.store.manifest import LocalAdapter, local
from soma_vllm.adapters.store.protocol import AdapterStore, AdapterStoreMeter
from soma_vllm.adapters.store.verify import NOTHING, Demands
from soma_vllm.errors import AdapterRejected, EngineUnavailable, NotFound, SomaError
from soma_vllm.types import AdapterRef


class DamageReports(Protocol):
    """Told of adapters whose files are gone or damaged: `maintenance.sweeper.SweepTrigger`."""

    def damaged(self, name: str) -> None: ...


class AdapterFileProvider:
    """The adapter store as the surrogate's engine needs it: `adapters.loaded.AdapterFiles`."""

    def __init__(
        self,
        adapter_store: AdapterStore,
        sweep_trigger: DamageReports,
        meter: AdapterStoreMeter,
        demands: Demands = NOTHING,
    ) -> None:
        """`demands` are the engine's: an adapter that does not meet them stays published, and is not loaded."""
        self._adapter_store = adapter_store
        self._sweep_trigger = sweep_trigger
        self._meter = meter
        self._demands = demands

    async def ensure_local(self, ref: AdapterRef) -> LocalAdapter:
        """An adapter whose files lie on this machine, byte by byte what was published, and fit the engine.

        Raises:
            EngineUnavailable: they do not; where they are gone or damaged, the sweeper is told.
        """
        started = time.monotonic()
        try:
            found = await asyncio.to_thread(self._adapter_store.resolve, ref.name)
        except SomaError as error:
            if isinstance(error, NotFound | AdapterRejected):  # not where the store does not answer now
                self._sweep_trigger.damaged(ref.name)
            raise EngineUnavailable(f"adapter {ref.name} cannot be loaded: {error}") from error
        self._meter.fetched(time.monotonic() - started)
        return fit(found, self._demands)


class FilesInPlace:
    """Adapters whose files lie where their references say, for an engine without a store."""

    def __init__(self, demands: Demands = NOTHING) -> None:
        self._demands = demands

    async def ensure_local(self, ref: AdapterRef) -> LocalAdapter:
        """As `AdapterFileProvider.ensure_local`. Raises EngineUnavailable."""
        try:
            found = await asyncio.to_thread(local, ref.name, Path(ref.path))
        except (SomaError, OSError) as error:
            raise EngineUnavailable(f"adapter {ref.name} is not fit to be loaded: {error}") from error
        return fit(found, self._demands)


def fit(found: LocalAdapter, demands: Demands) -> LocalAdapter:
    """The adapter, where it meets what an engine demands. Raises EngineUnavailable."""
    if problems := list(demands.unmet(found.facts.rank, found.facts.base_model)):
        raise EngineUnavailable(f"adapter {found.ref.name} is not fit to be loaded: {'; '.join(problems)}")
    return found
