"""Who may use an engine's adapter slots, and who waits for one: a pure state machine.

Guarantees, whatever is asked in whatever order:

* Never more distinct adapters in use than there are slots.
* Users wait first come, first served, by adapter: those who wait for the same adapter get it together, since it
  takes one slot for all of them.
* A hot adapter starves no other: while a request waits, at most `OVERTAKES` later requests get in before it, by
  an adapter that is in use anyway; all others queue behind.
* The background comes after users and takes at most `BACKGROUND_SLOTS` slots, but is not starved either: after
  `PATIENCE` grants to users it queues as a user does.
* No request waits for what is free: whatever lets the next one in says so at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

OVERTAKES = 4
"""Later requests that may get in before a waiting one."""
PATIENCE = 16
"""Grants to users after which the background's turn has come."""
BACKGROUND_SLOTS = 1
"""Slots that adapters used by the background alone may take."""


class State(StrEnum):
    """Of a request for an adapter."""

    GRANTED = "granted"
    WAITING = "waiting"
    FULL = "full"
    """Refused: every slot is taken, and so is every place in the queue."""
    DRAINING = "draining"
    """Refused: the adapter is being removed."""
    OVER = "over"
    """Given back, or given up."""


@dataclass(eq=False)
class SlotRequest:
    """One request to use an adapter."""

    name: str
    background: bool
    state: State


@dataclass
class _Line:
    """Those who wait for one adapter."""

    tickets: list[SlotRequest]
    since: int
    """Reading of the counter that limits how long they wait, when the first of them came."""


class AdapterSlots:
    """Grants, queues and refuses."""

    def __init__(self, slots: int, queue_limit: int = 0) -> None:
        """`queue_limit` is the most users that wait at the same time."""
        self._slots = slots
        self._queue_limit = queue_limit
        self._used: Counter[str] = Counter()
        self._by_background: Counter[str] = Counter()
        self._queue: dict[str, _Line] = {}
        self._background: dict[str, _Line] = {}
        self._draining: set[str] = set()
        self._overtaken = 0
        self._user_grants = 0

    # -- verbs: each says which other tickets it decided ------------------------------------------------

    def acquire(self, name: str, background: bool = False) -> tuple[SlotRequest, list[SlotRequest]]:
        """(a ticket that is granted, waits or is refused; the others). The background always may wait."""
        ticket = SlotRequest(name, background, State.WAITING)
        if name in self._draining:
            ticket.state = State.DRAINING
        elif self._may_enter(ticket):
            self._grant(ticket)
        elif background:
            self._line_up(self._background, ticket, self._user_grants)
        elif self.waiting() < self._queue_limit:
            self._line_up(self._queue, ticket, self._overtaken)
        else:
            ticket.state = State.FULL
        return ticket, self._admit()

    def release(self, ticket: SlotRequest) -> list[SlotRequest]:
        """End a use."""
        assert ticket.state is State.GRANTED, f"found a ticket that is {ticket.state}; expected granted"
        ticket.state = State.OVER
        _take(self._used, ticket.name)
        if ticket.background:
            _take(self._by_background, ticket.name)
        return self._admit()

    def cancel(self, ticket: SlotRequest) -> list[SlotRequest]:
        """Wait no longer."""
        assert ticket.state is State.WAITING, f"found a ticket that is {ticket.state}; expected waiting"
        ticket.state = State.OVER
        for queue in (self._queue, self._background):
            line = queue.get(ticket.name)
            if line is not None and ticket in line.tickets:
                line.tickets.remove(ticket)
                if not line.tickets:
                    del queue[ticket.name]
        return self._admit()

    def drain(self, name: str) -> list[SlotRequest]:
        """Grant an adapter to no new request; those that wait for it are refused."""
        self._draining.add(name)
        refused = []
        for queue in (self._queue, self._background):
            if (line := queue.pop(name, None)) is not None:
                refused += line.tickets
        for ticket in refused:
            ticket.state = State.DRAINING
        return refused + self._admit()

    def forget(self, name: str) -> None:
        """An adapter is gone; nothing need be remembered of it."""
        self._draining.discard(name)

    # -- looking ----------------------------------------------------------------------------------------

    def in_use(self, name: str) -> bool:
        """Whether an adapter is granted to any request."""
        return name in self._used

    def can_acquire(self, name: str) -> bool:
        """Whether a user would get in at once."""
        return name not in self._draining and self._may_enter(SlotRequest(name, False, State.WAITING))

    def count(self) -> int:
        """Uses under way."""
        return self._used.total()

    def distinct(self) -> int:
        """Slots taken."""
        return len(self._used)

    def waiting(self) -> int:
        """Users in the queue."""
        return sum(not ticket.background for line in self._queue.values() for ticket in line.tickets)

    # -- rules ------------------------------------------------------------------------------------------

    def _may_enter(self, ticket: SlotRequest) -> bool:
        """Whether a newcomer gets in at once."""
        if not self._queue:
            return self._fits(ticket.name, ticket.background)
        # The first in the queue waits for a slot, so none is free.
        if ticket.background or ticket.name not in self._used:
            return False
        first = next(iter(self._queue.values()))
        return self._overtaken - first.since < OVERTAKES

    def _fits(self, name: str, background: bool) -> bool:
        if name in self._used:
            return True
        alone = sum(count == self._by_background[used] for used, count in self._used.items())
        return len(self._used) < self._slots and not (background and alone >= BACKGROUND_SLOTS)

    def _grant(self, ticket: SlotRequest) -> None:
        ticket.state = State.GRANTED
        self._used[ticket.name] += 1
        if ticket.background:
            self._by_background[ticket.name] += 1
            return
        self._user_grants += 1
        if self._queue:
            self._overtaken += 1

    def _line_up(self, queue: dict[str, _Line], ticket: SlotRequest, since: int) -> None:
        # A name stands in one queue: who joins those that wait already shares their place.
        line = self._queue.get(ticket.name) or queue.setdefault(ticket.name, _Line([], since))
        line.tickets.append(ticket)

    def _promote(self) -> None:
        """Put a background that has waited long enough at the end of the users' queue."""
        for name, line in list(self._background.items()):
            if self._user_grants - line.since < PATIENCE:
                break
            del self._background[name]
            self._queue.setdefault(name, _Line([], self._overtaken)).tickets.extend(line.tickets)

    def _admit(self) -> list[SlotRequest]:
        """Grant in turn, until the next one has to wait."""
        admitted: list[SlotRequest] = []
        while True:
            self._promote()
            queue = self._queue or self._background
            if not queue:
                return admitted
            name = next(iter(queue))
            if not self._fits(name, queue is self._background):
                return admitted
            tickets = queue.pop(name).tickets
            self._grant_all(tickets)
            admitted += tickets

    def _grant_all(self, tickets: Iterable[SlotRequest]) -> None:
        overtaken = self._overtaken
        for ticket in tickets:
            self._grant(ticket)
        self._overtaken = overtaken  # a request that has waited overtakes none


def _take(counter: Counter[str], name: str) -> None:
    counter[name] -= 1
    if counter[name] == 0:
        del counter[name]
