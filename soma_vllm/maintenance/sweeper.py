"""Runs retention and adapter eviction at intervals, and early after a publication or a damaged load."""

from __future__ import annotations

import logging

from soma_vllm.errors import AdapterError, SomaError
from soma_vllm.maintenance.adapter_eviction import AdapterEvictor
from soma_vllm.maintenance.retention import Retention
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.supervised import SupervisedTask

logger = logging.getLogger(__name__)

SWEEP_EVERY_S = 60.0


class Sweeper:
    """One task that sweeps until it is stopped."""

    def __init__(
        self,
        retention: Retention,
        evictor: AdapterEvictor,
        trigger: SweepTrigger,
        every_s: float = SWEEP_EVERY_S,
    ) -> None:
        self._retention = retention
        self._evictor = evictor
        self._trigger = trigger
        self._every_s = every_s
        self.task = SupervisedTask("sweeper", self._run)
        """Sweeps, until `stop`."""

    def start(self) -> None:
        """Begin to sweep."""
        self.task.start()

    async def stop(self) -> None:
        """End the sweep under way."""
        await self.task.stop()

    async def _run(self) -> None:
        while True:
            await self._trigger.wait(self._every_s)
            try:
                await self._retention.sweep()
                await self._evictor.sweep()
            except AdapterError as error:
                logger.warning(
                    "the adapter store did not answer; no adapter is evicted until the sweep in %g s: %s",
                    self._every_s,
                    error,
                )
            except SomaError as error:
                logger.warning(
                    "the session store did not answer; what has expired stays until the sweep in %g s: %s",
                    self._every_s,
                    error,
                )
