"""Wakes the sweeper early after a publication, or when an adapter's files are found damaged."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import Event, SessionKey

SETTLED_S = 0.5
"""Publications within this time are one reason to sweep."""


class SweepTrigger:
    """An observer of publications that the sweeper waits for."""

    kinds = frozenset({EventKind.ADAPTER_PUBLISHED})

    def __init__(self) -> None:
        self._wake = asyncio.Event()
        self._damaged: set[str] = set()

    def __call__(self, key: SessionKey, event: Event) -> None:
        """Wake after a publication: budgets may be exceeded."""
        self._wake.set()

    def damaged(self, name: str) -> None:
        """Wake because an adapter cannot be loaded any more."""
        self._damaged.add(name)
        self._wake.set()

    def take_damaged(self) -> frozenset[str]:
        """Adapters reported since the last call."""
        found, self._damaged = frozenset(self._damaged), set()
        return found

    async def wait(self, limit_s: float) -> None:
        """Return when woken (and after what else happens within `SETTLED_S`), or when the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), limit_s)
            await asyncio.sleep(SETTLED_S)
        self._wake.clear()
