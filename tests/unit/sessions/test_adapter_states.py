"""The life of an adapter: which moves there are, and that there are no others."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from soma_vllm.errors import IllegalMove
from soma_vllm.sessions.state.adapter_states import BY_EVENT, MOVES, AdapterLives, AdapterState, moved
from soma_vllm.types import Event

LIFE = ["adapter_published", "adapter_loaded", "switched", "adapter_draining", "adapter_retired"]
ALLOWED = {
    ("TRAINED", "VERIFIED"),
    ("VERIFIED", "LOADED"),
    ("VERIFIED", "DRAINING"),
    ("LOADED", "ACTIVE"),
    ("LOADED", "DRAINING"),
    ("ACTIVE", "ACTIVE"),
    ("ACTIVE", "DRAINING"),
    ("DRAINING", "DRAINING"),
    ("DRAINING", "RETIRED"),
}


def event(kind: str, name: str = "a") -> Event:
    data: dict[str, Any] = {"adapter": {"name": name, "number": 1, "path": "/p"}}
    return Event(kind, 0.0, data)


@pytest.mark.parametrize(("state", "to"), list(product(AdapterState, AdapterState)))
def test_a_move_is_legal_exactly_where_the_table_has_it(state: AdapterState, to: AdapterState) -> None:
    if (state, to) in ALLOWED:
        assert moved("a", state, to) is to
    else:
        with pytest.raises(IllegalMove, match=f"found a move from {state} to {to}"):
            moved("a", state, to)


def test_every_state_has_its_moves_and_nothing_leaves_the_last() -> None:
    assert MOVES.keys() == set(AdapterState)
    assert MOVES[AdapterState.RETIRED] == frozenset()
    assert set(BY_EVENT.values()) == set(AdapterState) - {AdapterState.TRAINED}


def test_events_lead_an_adapter_through_its_life() -> None:
    lives = AdapterLives()
    states = [found[1] for kind in LIFE if (found := lives.note(event(kind))) is not None]
    assert states == ["VERIFIED", "LOADED", "ACTIVE", "DRAINING", "RETIRED"]
    assert lives.of("a") is AdapterState.RETIRED


@pytest.mark.parametrize("late", LIFE)
def test_nothing_brings_a_retired_adapter_back(late: str) -> None:
    lives = AdapterLives()
    for kind in LIFE:
        lives.note(event(kind))
    with pytest.raises(IllegalMove, match="from RETIRED"):
        lives.note(event(late))
    assert lives.of("a") is AdapterState.RETIRED


def test_an_event_that_names_no_adapter_moves_none() -> None:
    lives = AdapterLives()
    assert lives.note(Event("switched", 0.0, {"adapter": None})) is None
    assert lives.note(event("audited")) is None
    assert lives.of("a") is None


def test_an_adapter_of_before_a_restart_goes_on_from_what_the_record_says() -> None:
    lives = AdapterLives()
    lives.recall(event("switched"))
    with pytest.raises(IllegalMove, match="from ACTIVE to LOADED"):
        lives.note(event("adapter_loaded"))
    lives.note(event("adapter_draining"))
    lives.recall(event("switched"))
    assert lives.of("a") is AdapterState.DRAINING, "what happened since is known better"


def test_an_adapter_cannot_be_published_twice() -> None:
    lives = AdapterLives()
    lives.note(event("adapter_published"))
    with pytest.raises(IllegalMove, match="from VERIFIED to VERIFIED"):
        lives.note(event("adapter_published"))
