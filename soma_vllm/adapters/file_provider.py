"""Brings an adapter's files to this machine before an engine loads them."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

from soma_vllm.adapters.store.protocol import Shelf, StockMeter
from soma_vllm.errors import AdapterRejected, EngineUnavailable, NotFound, SomaError
from soma_vllm.types import AdapterRef


class DamageReports(Protocol):
    """Told of adapters whose files are gone or damaged: `maintenance.sweeper.SweepTrigger`."""

    def damaged(self, name: str) -> None: ...


class AdapterFileProvider:
    """The shelf as the surrogate's engine needs it: `adapters.loaded.AdapterFiles`."""

    def __init__(self, adapter_store: Shelf, sweep_trigger: DamageReports, meter: StockMeter) -> None:
        self._adapter_store = adapter_store
        self._sweep_trigger = sweep_trigger
        self._meter = meter

    async def ensure_local(self, ref: AdapterRef) -> AdapterRef:
        """An adapter whose files lie on this machine, byte by byte what was published.

        Raises:
            EngineUnavailable: they do not; the care for adapters is told.
        """
        started = time.monotonic()
        try:
            here = await asyncio.to_thread(self._adapter_store.resolve, ref.name)
        except SomaError as error:
            if isinstance(error, NotFound | AdapterRejected):  # not where the shelf does not answer now
                self._sweep_trigger.damaged(ref.name)
            raise EngineUnavailable(f"adapter {ref.name} cannot be loaded: {error}") from error
        self._meter.fetched(time.monotonic() - started)
        return here
