"""Erases text and removes sessions whose configured time is over."""

from __future__ import annotations

import time

from soma_vllm.config import Retention as RetentionSettings
from soma_vllm.maintenance.removal import SessionRemoval
from soma_vllm.sessions.registry import SessionRegistry

REMOVED_AT_ONCE = 200
"""Sessions that one sweep removes at most."""


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
        await self._removal.finish_interrupted()
        now = time.time()
        if self._settings.text_ttl_s is not None:
            await self._registry.erasure.erase_before(now - self._settings.text_ttl_s)
        if self._settings.session_ttl_s is None:
            return 0
        await self._registry.store.delete_unused_objects(now - self._settings.session_ttl_s)
        removed = 0
        for key in await self._registry.store.idle_since(now - self._settings.session_ttl_s, REMOVED_AT_ONCE):
            if not self._registry.holds(key):
                await self._removal.remove(key)
                removed += 1
        return removed
