"""Leases on adapters: from reservation to the last token, for users and for background work.

Guarantees: no more distinct adapters are held than the engine has slots, so no request queues behind another
session's adapter inside the engine; who waits for a slot is served in a fair order (`slots.py`) and waits at
most the configured time; from the call of `drain` on no new lease is granted, and it returns when the last one
is given back; a wait that is cancelled leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from soma_vllm.adapters.meter import AdapterMeter, Outcome, Unmetered
from soma_vllm.adapters.slots import AdapterSlots, SlotRequest, State
from soma_vllm.errors import NoAdapterSlot

BACKGROUND_WAIT_S = 600.0
"""Longest wait of work that no user waits for."""


class AdapterLeases:
    """Who is using which adapter. Single event loop, no locks needed."""

    def __init__(
        self, slots: int, queue_limit: int = 0, wait_s: float = 0.0, meter: AdapterMeter | None = None
    ) -> None:
        """`queue_limit` users wait, each at most `wait_s` seconds; 0 of either: none does."""
        self._slots = AdapterSlots(slots, queue_limit if wait_s > 0 else 0)
        self._wait_s = wait_s
        self._meter: AdapterMeter = meter or Unmetered()
        self._waiting: dict[SlotRequest, asyncio.Future[None]] = {}
        self._unused: dict[str, asyncio.Event] = {}

    async def acquire(self, name: str) -> SlotRequest:
        """A hold on an adapter, to be given to `release`.

        Raises:
            NoAdapterSlot: there is no slot, there was none in time, or the adapter is leaving.
        """
        ticket = self._ask(name)
        if ticket.state is State.WAITING:
            began = time.monotonic()
            await self._turn(ticket, self._wait_s)
            self._meter.waited(time.monotonic() - began, _OUTCOMES[ticket.state])
        if ticket.state is State.GRANTED:
            return ticket
        self._meter.overflowed(_OUTCOMES[ticket.state])
        raise NoAdapterSlot(_why(ticket))

    async def release(self, ticket: SlotRequest) -> None:
        """Give a hold back."""
        self._tell(self._slots.release(ticket))
        if not self._slots.in_use(ticket.name) and (unused := self._unused.pop(ticket.name, None)) is not None:
            unused.set()

    @asynccontextmanager
    async def background(self, name: str | None) -> AsyncIterator[None]:
        """Use an adapter in the background: users come first, and the adapter stays until the end.

        Raises:
            NoAdapterSlot: the adapter is leaving, or users left no slot for very long.
        """
        if name is None:
            yield
            return
        ticket = self._ask(name, background=True)
        if ticket.state is State.WAITING:
            await self._turn(ticket, BACKGROUND_WAIT_S)
        if ticket.state is not State.GRANTED:
            raise NoAdapterSlot(_why(ticket))
        try:
            yield
        finally:
            await self.release(ticket)

    async def drain(self, name: str) -> None:
        """Grant no new lease on the adapter, and wait until the last one is given back."""
        self._tell(self._slots.drain(name))
        if self._slots.in_use(name):
            await self._unused.setdefault(name, asyncio.Event()).wait()

    def forget(self, name: str) -> None:
        """The adapter's files are gone; nothing need be remembered of it."""
        self._slots.forget(name)

    def can_acquire(self, name: str) -> bool:
        """Whether a user would get a hold at once."""
        return self._slots.can_acquire(name)

    def in_use(self, name: str) -> bool:
        """Whether an adapter is leased, to a user or to background work."""
        return self._slots.in_use(name)

    def count(self) -> int:
        """Holds under way."""
        return self._slots.count()

    def distinct(self) -> int:
        """Adapters held."""
        return self._slots.distinct()

    def waiting(self) -> int:
        """Users in the queue."""
        return self._slots.waiting()

    def _ask(self, name: str, background: bool = False) -> SlotRequest:
        ticket, others = self._slots.acquire(name, background)
        self._tell(others)
        return ticket

    async def _turn(self, ticket: SlotRequest, limit_s: float) -> None:
        """Wait until a ticket is decided, or its time is up."""
        decided = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([decided], timeout=limit_s)
        except asyncio.CancelledError:
            if ticket.state is State.GRANTED:
                await self.release(ticket)
            raise
        finally:
            del self._waiting[ticket]
            if ticket.state is State.WAITING:
                self._tell(self._slots.cancel(ticket))

    def _tell(self, decided: list[SlotRequest]) -> None:
        for ticket in decided:
            if (future := self._waiting.get(ticket)) is not None and not future.done():
                future.set_result(None)


_OUTCOMES: dict[State, Outcome] = {
    State.GRANTED: "granted",
    State.FULL: "full",
    State.OVER: "timed_out",
    State.DRAINING: "leaving",
}


def _why(ticket: SlotRequest) -> str:
    if ticket.state is State.DRAINING:
        return f"adapter {ticket.name} is leaving"
    waited = " and stayed so" if ticket.state is State.OVER else ""
    return f"all adapter slots are in use{waited}"
