"""Lanes: how many dialogues of a replay ask at the same time, and who is next.

Guarantees: at most `count` holders at once; a free lane goes to the waiter of the lowest rank, so that a
dialogue which comes back goes on before one that has not begun.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count


class Lanes:
    """A counted lock with ranks. Single event loop."""

    def __init__(self, lanes: int) -> None:
        self._free = lanes
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrival = count()

    @asynccontextmanager
    async def lane(self, rank: int) -> AsyncIterator[None]:
        """Hold a lane while the block runs; the lowest `rank` of those who wait comes first."""
        await self.enter(rank)
        try:
            yield
        finally:
            self.leave()

    async def enter(self, rank: int) -> None:
        """Wait for a lane."""
        if self._free > 0:
            self._free -= 1
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._arrival), granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Give a lane back."""
        while self._waiting:
            _, _, granted = heapq.heappop(self._waiting)
            if not granted.done():
                granted.set_result(None)
                return
        self._free += 1
