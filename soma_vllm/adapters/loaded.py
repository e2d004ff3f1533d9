"""Which adapters lie in the engine's memory. This side owns that; the engine never has to choose or to read.

An engine beyond its limit evicts silently, reads the adapter again inside a later step, and dies with
everyone's requests if the files are gone by then. Guarantees that keep it from that:

* Never more than `room` adapters are in the engine; before one more comes, the least recently used one that
  is not leased is removed. One that is leased stays, even if its files are deleted.
* Before each load the files are looked at; what is not fit never reaches the engine.
* Loads and removals are idempotent. Loads of one adapter at the same time are one load, which no caller's
  cancellation interrupts; loads and removals of one adapter never overlap.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from soma_vllm.adapters.file_provider import FilesInPlace
from soma_vllm.adapters.meter import AdapterMeter, Unmetered
from soma_vllm.adapters.store.manifest import LocalAdapter
from soma_vllm.errors import EngineUnavailable
from soma_vllm.types import AdapterRef, Signature

MARGIN = 1
"""Places of the engine's own cache that are left free, where it has more than slots."""
_STRIPES = 64


class Loading(Protocol):
    """What this needs of the engine. Both verbs raise EngineUnavailable."""

    async def add(self, ref: AdapterRef) -> None: ...
    async def remove(self, ref: AdapterRef) -> None: ...


class AdapterFiles(Protocol):
    """Where adapters' files come from."""

    async def ensure_local(self, ref: AdapterRef) -> LocalAdapter:
        """An adapter whose files lie on this machine and are fit for the engine. Raises EngineUnavailable."""
        ...


def room_for(max_loras: int, max_cpu_loras: int) -> int:
    """Adapters to keep in an engine of that many slots and that many places in memory."""
    return max(max_loras, max_cpu_loras - MARGIN)


class LoadedAdapters:
    """Loads, keeps and evicts adapters. Single event loop."""

    def __init__(
        self,
        engine: Loading,
        room: int,
        *,
        files: AdapterFiles | None = None,
        in_use: Callable[[str], bool] = lambda name: False,
        meter: AdapterMeter | None = None,
    ) -> None:
        """`in_use` says whether an adapter is leased."""
        self._engine = engine
        self._room = room
        self._files: AdapterFiles = files or FilesInPlace()
        self._in_use = in_use
        self.meter: AdapterMeter = meter or Unmetered()
        self._resident: dict[str, AdapterRef] = {}  # the least recently used first
        self._signatures: dict[str, Signature | None] = {}
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._stripes = tuple(asyncio.Lock() for _ in range(_STRIPES))
        self._changing = asyncio.Lock()

    async def load(self, ref: AdapterRef) -> None:
        """Have an adapter in the engine; the caller holds it.

        Raises:
            EngineUnavailable: its files are not fit, there is no room, or the engine did not take it.
        """
        began = time.monotonic()
        warm = ref.name in self._resident
        if warm:
            self._resident[ref.name] = self._resident.pop(ref.name)
        else:
            await asyncio.shield(self._task(ref))
        self.meter.loaded(time.monotonic() - began, warm)

    def prefetch(self, ref: AdapterRef) -> None:
        """Begin to load an adapter that a request will need; a failure is raised by the `load` that follows."""
        if ref.name not in self._resident:
            self._task(ref)

    async def unload(self, ref: AdapterRef) -> None:
        """Have an adapter out of the engine. The caller sees to it that no request uses it.

        Raises:
            EngineUnavailable: the engine did not answer.
        """
        async with self._stripe(ref.name):
            if ref.name in self._resident:
                async with self._changing:
                    await self._remove(ref)

    def resident(self) -> tuple[AdapterRef, ...]:
        """Adapters in the engine, the least recently used first."""
        return tuple(self._resident.values())

    def has(self, name: str) -> bool:
        """Whether an adapter is in the engine."""
        return name in self._resident

    def signature(self, name: str) -> Signature | None:
        """What the trainer said a resident adapter does, where its manifest tells."""
        return self._signatures.get(name)

    def _task(self, ref: AdapterRef) -> asyncio.Task[None]:
        """The one load of an adapter that is under way."""
        task = self._coming.get(ref.name)
        if task is None:
            task = asyncio.create_task(self._bring(ref), name=f"soma-load-{ref.name}")
            self._coming[ref.name] = task
            task.add_done_callback(lambda done: self._came(ref.name, done))
        return task

    def _came(self, name: str, done: asyncio.Task[None]) -> None:
        del self._coming[name]
        if not done.cancelled():
            done.exception()  # no one awaits a prefetch

    async def _bring(self, ref: AdapterRef) -> None:
        async with self._stripe(ref.name):
            if ref.name in self._resident:
                return
            local = await self._files.ensure_local(ref)
            async with self._changing:
                await self._make_room(ref)
                await self._add(local.ref)
                self._resident[ref.name] = local.ref
                self._signatures[ref.name] = local.signature

    async def _make_room(self, ref: AdapterRef) -> None:
        while len(self._resident) >= self._room:
            idle = next((one for name, one in self._resident.items() if not self._in_use(name)), None)
            if idle is None:
                raise EngineUnavailable(
                    f"no room for adapter {ref.name}: found {len(self._resident)} in use; expected fewer than "
                    f"{self._room}"
                )
            await self._remove(idle)
            self.meter.evicted()

    async def _add(self, ref: AdapterRef) -> None:
        try:
            await self._engine.add(ref)
        except EngineUnavailable:
            with suppress(EngineUnavailable):
                await self._engine.remove(ref)  # it may have got half-way
            raise

    async def _remove(self, ref: AdapterRef) -> None:
        # Out of service first: who asks for it from here on loads it again, after the removal.
        del self._resident[ref.name]
        self._signatures.pop(ref.name, None)
        await self._engine.remove(ref)

    def _stripe(self, name: str) -> asyncio.Lock:
        """The lock of an adapter and of some others. None is ever dropped, so none is lost in a race."""
        return self._stripes[zlib.crc32(name.encode()) % _STRIPES]
