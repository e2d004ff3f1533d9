"""The life of an adapter, as one table.

    TRAINED -> VERIFIED -> LOADED -> ACTIVE -> DRAINING -> RETIRED

Guarantees: a move that is not in the table raises; nothing leaves RETIRED, and nothing enters it but through
DRAINING, in which no new request uses the adapter. Pure: adapters are moved by the events of their sessions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from enum import StrEnum

from soma_vllm.errors import IllegalMove
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.types import AdapterRef, Event


class AdapterState(StrEnum):
    """Where an adapter stands."""

    TRAINED = "TRAINED"
    """A trainer wrote its files; it has no name yet."""
    VERIFIED = "VERIFIED"
    """Its files were found fit, and are published."""
    LOADED = "LOADED"
    """An engine has it; it is being judged."""
    ACTIVE = "ACTIVE"
    """It serves a session, or several branches of one."""
    DRAINING = "DRAINING"
    """It serves no session any more; its last tokens are being generated."""
    RETIRED = "RETIRED"
    """Its files are gone. Its name and number stay spent."""


MOVES: Mapping[AdapterState, frozenset[AdapterState]] = {
    AdapterState.TRAINED: frozenset({AdapterState.VERIFIED}),
    AdapterState.VERIFIED: frozenset({AdapterState.LOADED, AdapterState.DRAINING}),
    AdapterState.LOADED: frozenset({AdapterState.ACTIVE, AdapterState.DRAINING}),
    # Another branch of its dialogue takes it over.
    AdapterState.ACTIVE: frozenset({AdapterState.ACTIVE, AdapterState.DRAINING}),
    # An engine that did not let go of it is asked again.
    AdapterState.DRAINING: frozenset({AdapterState.DRAINING, AdapterState.RETIRED}),
    AdapterState.RETIRED: frozenset(),
}
"""State -> the states that may follow it."""

BY_EVENT: Mapping[str, AdapterState] = {
    EventKind.ADAPTER_PUBLISHED: AdapterState.VERIFIED,
    EventKind.ADAPTER_LOADED: AdapterState.LOADED,
    EventKind.SWITCHED: AdapterState.ACTIVE,
    EventKind.INHERITED: AdapterState.ACTIVE,
    EventKind.ADAPTER_DRAINING: AdapterState.DRAINING,
    EventKind.ADAPTER_RETIRED: AdapterState.RETIRED,
}
"""Event of a session -> the state in which it leaves the adapter that it names."""

IN_THE_MAKING = frozenset({AdapterState.VERIFIED, AdapterState.LOADED})
"""An adaptation under way looks after it."""

REMEMBERED = 10_000
"""Retired adapters of which it is still known that they are."""


def moved(name: str, state: AdapterState, to: AdapterState) -> AdapterState:
    """The state after a move.

    Raises:
        IllegalMove: the table does not have it.
    """
    if to not in MOVES[state]:
        allowed = ", ".join(sorted(MOVES[state])) or "nothing"
        raise IllegalMove(f"adapter {name}: found a move from {state} to {to}; expected one to {allowed}")
    return to


class AdapterLives:
    """The states of the adapters that live sessions speak of."""

    def __init__(self) -> None:
        self._states: dict[str, AdapterState] = {}
        self._retired: OrderedDict[str, None] = OrderedDict()

    def of(self, name: str) -> AdapterState | None:
        """Where an adapter stands; None where no live session has said so."""
        return AdapterState.RETIRED if name in self._retired else self._states.get(name)

    def note(self, event: Event) -> tuple[AdapterRef, AdapterState] | None:
        """(the adapter, its new state) where this event moves one.

        An adapter that is not known, since it was published before a restart, stands wherever it is said to.

        Raises:
            IllegalMove: an adapter may not make this move; nothing changed.
        """
        ref, to = event.data.get("adapter"), BY_EVENT.get(event.kind)
        if to is None or not isinstance(ref, Mapping):
            return None
        name = str(ref["name"])
        if event.kind == EventKind.ADAPTER_PUBLISHED:
            moved(name, self.of(name) or AdapterState.TRAINED, to)
        elif (state := self.of(name)) is not None:
            moved(name, state, to)
        self._put(name, to)
        return AdapterRef(**ref), to

    def recall(self, event: Event) -> None:
        """Take an event of the past for what it says; what happened since is known better."""
        ref, to = event.data.get("adapter"), BY_EVENT.get(event.kind)
        if to is not None and isinstance(ref, Mapping) and self.of(str(ref["name"])) is None:
            self._put(str(ref["name"]), to)

    def _put(self, name: str, state: AdapterState) -> None:
        if state is not AdapterState.RETIRED:
            self._states[name] = state
            return
        self._states.pop(name, None)
        self._retired[name] = None
        if len(self._retired) > REMEMBERED:
            self._retired.popitem(last=False)
