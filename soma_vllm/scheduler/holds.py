"""Holds on adapters: from reservation to the last token.

Guarantees: never more distinct adapters held than the engine has slots, so no request queues behind another
session's adapter inside the engine; `drained` returns only when nobody holds the adapter any more.
"""

from __future__ import annotations

import asyncio
from collections import Counter


class AdapterHolds:
    """Counts who is using which adapter. Single event loop, no locks needed."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held: Counter[str] = Counter()
        self._released = asyncio.Condition()

    def try_hold(self, name: str) -> bool:
        """Take a hold; False when every slot is taken by another adapter."""
        if name not in self._held and len(self._held) >= self._slots:
            return False
        self._held[name] += 1
        return True

    async def release(self, name: str) -> None:
        """Give one hold back."""
        assert self._held[name] > 0, f"{name} is not held"
        self._held[name] -= 1
        if self._held[name] == 0:
            del self._held[name]
        async with self._released:
            self._released.notify_all()

    async def drained(self, name: str) -> None:
        """Wait until nobody holds the adapter."""
        async with self._released:
            await self._released.wait_for(lambda: name not in self._held)

    def held(self) -> dict[str, int]:
        """Holds by adapter."""
        return dict(self._held)
