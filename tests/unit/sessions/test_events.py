"""Payloads of events: what is stored stays as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.services import Services

from soma_vllm.sessions.state.events import Audited, EventKind, Judged, Payload, Switched, Trained
from soma_vllm.sessions.state.turn import turn_event, turn_of
from soma_vllm.types import AdapterRef, Candidate, Role

ADAPTER = {"name": "adapter-s-1", "number": 1, "path": "/adapters/1"}
TURN = {
    "number": 3,
    "engine": "surrogate",
    "adapter": "adapter-s-1",
    "phase": "SWITCHED",
    "reason": "locality 0.97 above 0.85",
    "usage": {"prompt_tokens": 9, "cached_tokens": None, "completion_tokens": 2},
    "ttft_s": 0.1,
    "latency_s": 0.5,
    "most_tokens": 64,
    "complete": True,
    "chain": "c" * 64,
    "asked": "a" * 64,
    "links": ["1" * 32],
    "left_out": [0, 1],
    "response": "resp_1",
    "skip": "the original did not answer it",
    "builds_on": 2,
}
TEXT = {"messages": [{"role": "user", "content": "question 3"}], "answer": "same", "calls": []}
NUMBERS = {
    "candidates": {
        "plain": {"turns": [2], "gaps": [0.0], "mean_gap": 0.0, "passes": True, "failure": None, "nll": 1.0}
    },
    "accept_threshold": 0.1,
    "setbacks": 0,
}
STORED: list[tuple[type[Payload], dict[str, Any]]] = [
    (Judged, {"candidate": "plain", "reason": "gap 0.000 within 0.1", "numbers": NUMBERS}),
    (Judged, {"candidate": "original", "reason": "no candidate", "numbers": {"candidates": {}}}),
    (Switched, {"candidate": "plain", "reason": "gap", "adapter": None, "centroid": [1.0, 0.0]}),
    (Switched, {"candidate": "adapter", "reason": "no gate", "adapter": ADAPTER, "centroid": None}),
    (
        Trained,
        {
            "mining_s": 0.1,
            "finetune_s": 0.2,
            "scoring_s": 0.3,
            "steps": 4,
            "distilled": False,
            "flops": 1.0,
            "losses": [1.0, 0.5],
            "hardness": {"1": 1.0},
            "checkpoints": [{"steps": 0, "nll": 1.0, "top1": 0.5}],
            "plain": {"nll": 1.0, "top1": 0.5, "tokens": 10},
            "adapted": None,
        },
    ),
    (
        Audited,
        {"turn": 3, "kind": "gap", "gap": 0.25, "surprise": None, "top1": None, "served_by": "surrogate"},
    ),
    (
        Audited,
        {"turn": 3, "kind": "surprise", "gap": None, "surprise": 1.5, "top1": 0.5, "served_by": "original"},
    ),
]
PAYLOADS: dict[str, type[Payload]] = {
    EventKind.JUDGED: Judged,
    EventKind.SWITCHED: Switched,
    EventKind.TRAINED: Trained,
    EventKind.AUDITED: Audited,
}


@pytest.mark.parametrize(("payload", "stored"), STORED)
def test_a_payload_is_stored_as_it_was_read(payload: type[Payload], stored: dict[str, Any]) -> None:
    found = payload.from_data(stored).to_data()
    assert found == stored
    assert json.dumps(found) == json.dumps(stored)


@pytest.mark.parametrize("text", [TEXT, None])
def test_a_turn_is_stored_as_it_was_read(text: dict[str, Any] | None) -> None:
    event = turn_event(turn_of(TURN, text), TURN["builds_on"], 1.0)
    assert json.loads(json.dumps(event.data)) == TURN
    assert event.text == text


def test_fields_have_the_types_that_they_name() -> None:
    switched = Switched.from_data(STORED[3][1])
    assert switched.candidate is Candidate.ADAPTER
    assert switched.adapter == AdapterRef(**ADAPTER)
    assert Switched.from_data(STORED[2][1]).centroid == (1.0, 0.0)
    assert Audited.from_data(STORED[6][1]).served_by is Role.ORIGINAL
    assert [Audited.from_data(data).value for _, data in STORED[5:]] == [0.25, 1.5]


def test_keys_of_a_later_version_are_ignored_and_those_an_older_one_left_out_have_defaults() -> None:
    found = Audited.from_data({"turn": 2, "gap": 1.5, "colour": "red"})
    assert found == Audited(2, "gap", 1.5)


async def test_whatever_is_recorded_of_a_typed_kind_is_its_payload(services: Services) -> None:
    services.config.gate.__dict__["audit_rate"] = 1.0
    services.surrogate.answers = ["different", "same"]
    history: list[dict[str, Any]] = []
    for number in range(1, 4):
        await services.say(history, f"question {number}")
        await services.settled()
    recorded = {event.kind: event.data for _, event in services.events if event.kind in PAYLOADS}
    assert recorded.keys() == PAYLOADS.keys()
    for kind, data in recorded.items():
        assert PAYLOADS[kind].from_data(data).to_data() == data
