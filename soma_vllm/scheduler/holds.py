"""Holds on adapters: from reservation to the last token.

Guarantees: users never hold more distinct adapters than the engine has slots, so no request queues behind
another session's adapter inside the engine; `leaving` returns only when nobody uses the adapter any more, and
from its call on nobody new can. An engine asked for a deleted adapter would die, with everyone's requests.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from soma_vllm.errors import EngineUnavailable


class AdapterHolds:
    """Counts who is using which adapter. Single event loop, no locks needed."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held: Counter[str] = Counter()
        self._shadowed: Counter[str] = Counter()
        self._leaving: set[str] = set()
        self._released = asyncio.Condition()

    def try_hold(self, name: str) -> bool:
        """Take a hold; False when every slot is taken by another adapter, or this one is leaving."""
        if name in self._leaving:
            return False
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
        await self._tell()

    @asynccontextmanager
    async def shadowing(self, name: str | None) -> AsyncIterator[None]:
        """Use an adapter in the background: it takes no user's slot, but keeps the adapter from leaving.

        Raises:
            EngineUnavailable: the adapter is leaving.
        """
        if name is None:
            yield
            return
        if name in self._leaving:
            raise EngineUnavailable(f"adapter {name} is leaving")
        self._shadowed[name] += 1
        try:
            yield
        finally:
            self._shadowed[name] -= 1
            if self._shadowed[name] == 0:
                del self._shadowed[name]
            await self._tell()

    async def leaving(self, name: str) -> None:
        """Let nobody new use the adapter, for ever, and wait until nobody does."""
        self._leaving.add(name)
        async with self._released:
            await self._released.wait_for(lambda: name not in self._held and name not in self._shadowed)

    def left(self, name: str) -> None:
        """The adapter's files are gone; nothing need be remembered of it."""
        self._leaving.discard(name)

    async def _tell(self) -> None:
        async with self._released:
            self._released.notify_all()

    def held(self) -> dict[str, int]:
        """Holds by adapter."""
        return dict(self._held)
