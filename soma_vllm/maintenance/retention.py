"""Erases text and removes sessions whose configured time is over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from soma_vllm.config import Retention as RetentionSettings
from soma_vllm.maintenance.removal import SessionRemoval
from soma_vllm.sessions.registry import SessionRegistry
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.types import SessionKey

REMOVED_AT_ONCE = 200
"""Sessions that are removed at the same time."""
REMOVAL_S = 1.0
"""Longest wait for removals that were begun before; what takes longer goes on beside the sweep."""
IDLE_REMOVAL_S = 30.0
"""Longest wait for those of idle sessions, which wait for no request: a slow database is no reason to stop."""


class Retention:
    """Keeps to the configured retention."""

    def __init__(
        self,
        settings: RetentionSettings,
        registry: SessionRegistry,
        removal: SessionRemoval,
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._removal = removal

    async def sweep(self) -> int:
        """Erase and remove; how many sessions were removed. Raises StoreUnavailable."""
        await self._removed(await self._registry.store.in_phase(Phase.CLOSED), REMOVAL_S)
        now = time.time()
        if self._settings.text_ttl_s is not None:
            await self._registry.erasure.erase_before(now - self._settings.text_ttl_s)
        if self._settings.session_ttl_s is None:
            return 0
        await self._registry.store.delete_unused_objects(now - self._settings.session_ttl_s)
        removed, more = 0, True
        while more:
            before = now - self._settings.session_ttl_s
            idle = await self._registry.store.idle_since(before, REMOVED_AT_ONCE)
            unused = [key for key in idle if not self._registry.holds(key)]
            done = await self._removed(unused, IDLE_REMOVAL_S)
            await self._registry.written()
            removed += done
            more = len(idle) == REMOVED_AT_ONCE and done > 0
        return removed

    async def _removed(self, keys: Sequence[SessionKey], limit_s: float) -> int:
        """Begin to remove sessions, and wait for them, but not for long; how many are gone. One whose stream is
        still open must not hold up the others."""
        if not keys:
            return 0
        done, _ = await asyncio.wait([self._removal.begin(key) for key in keys], timeout=limit_s)
        for task in done:
            task.result()
        return len(done)
