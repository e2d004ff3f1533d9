"""What the care for adapters should hear of at once: a publication, and files found damaged at a load."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import Event, SessionKey

SETTLED_S = 0.5
"""Publications within this time are one reason to sweep."""


class SweepTrigger:
    """An observer of publications, and a bell."""

    kinds = frozenset({EventKind.ADAPTER_PUBLISHED})

    def __init__(self) -> None:
        self._bell = asyncio.Event()
        self._damaged: set[str] = set()

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Ring when an adapter was published: budgets may be exceeded."""
        self._bell.set()

    def damaged(self, name: str) -> None:
        """Ring because an adapter cannot be loaded any more."""
        self._damaged.add(name)
        self._bell.set()

    def take_damaged(self) -> frozenset[str]:
        """Adapters reported since the last call."""
        found, self._damaged = frozenset(self._damaged), set()
        return found

    async def wait(self, limit_s: float) -> None:
        """Return when the bell rang (and whoever rings close to it has), or the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._bell.wait(), limit_s)
            await asyncio.sleep(SETTLED_S)
        self._bell.clear()
