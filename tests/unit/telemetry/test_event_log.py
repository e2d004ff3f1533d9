"""Changes of phase and steps of a training are one line each."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest

from soma_vllm.logs import LogContext
from soma_vllm.sessions.state.events import EventKind
from soma_vllm.telemetry import event_log
from soma_vllm.telemetry.event_log import EventLog
from soma_vllm.types import Event, SessionKey

KEY = SessionKey("t", "s")
ADAPTER = {"name": "adapter-s-1", "number": 1, "path": "/somewhere"}
JUDGED = {
    "candidate": "adapter",
    "reason": "gap 0.021 within 0.1",
    "numbers": {"candidates": {"plain": {"mean_gap": 0.3}, "adapter": {"mean_gap": 0.0214}}},
}


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    """What was logged, each line with its ids."""
    caplog.set_level(logging.INFO, "soma_vllm.telemetry")
    ids = LogContext()
    caplog.handler.addFilter(ids)
    yield lambda: [record.getMessage() + record.__dict__["context"] for record in caplog.records]
    caplog.handler.removeFilter(ids)


def tell(log: EventLog, kind: str, **data: Any) -> None:
    log(
        KEY,
        Event(kind, 0.0, data, {"messages": [{"role": "user", "content": "a secret"}], "answer": "a secret"}),
    )


def test_a_switch_names_candidate_gap_turn_and_adapter(lines: Any) -> None:
    log = EventLog()
    tell(log, EventKind.TURN, number=5)
    tell(log, EventKind.JUDGED, **JUDGED)
    tell(log, EventKind.SWITCHED, candidate="adapter", reason="…", adapter=ADAPTER, centroid=[0.1])
    assert lines() == ["switched candidate=adapter gap=0.0214 turn=5 adapter=adapter-s-1 session=s tenant=t"]


def test_a_refusal_and_a_rollback_give_their_numbers(lines: Any) -> None:
    log = EventLog()
    tell(log, EventKind.JUDGED, **JUDGED)
    tell(log, EventKind.REFUSED, reason="plain: gap 0.300 above 0.1", found_wanting=True)
    tell(log, EventKind.ROLLED_BACK, moving=0.31, window=[], breaches=2, drift_threshold=0.2)
    refused, rolled_back = lines()
    assert 'plain_gap=0.3 adapter_gap=0.0214 reason="plain: gap 0.300 above 0.1"' in refused
    assert rolled_back.startswith("rolled back to the original moving=0.31 drift_threshold=0.2 breaches=2")


def test_a_training_is_followed_from_its_submission_to_its_adapter_in_the_engine(lines: Any) -> None:
    log = EventLog()
    tell(log, EventKind.TRAINING_SUBMITTED, turns=[1, 2], teacher="logprobs")
    tell(log, EventKind.TRAINED, mining_s=1.0, finetune_s=2.5, scoring_s=0.5, steps=8)
    tell(log, EventKind.ADAPTER_PUBLISHED, adapter=ADAPTER)
    tell(log, EventKind.ADAPTER_LOADED, adapter=ADAPTER)
    assert [line.removesuffix(" session=s tenant=t") for line in lines()] == [
        "training submitted turns=2 teacher=logprobs",
        "trained seconds=4 steps=8",
        "adapter published adapter=adapter-s-1",
        "adapter loaded adapter=adapter-s-1",
    ]


def test_turns_and_audits_are_not_logged_and_nothing_is_kept_of_a_session_that_is_removed(lines: Any) -> None:
    log = EventLog()
    tell(log, EventKind.TURN, number=1)
    tell(log, EventKind.AUDITED, gap=0.1)
    assert lines() == []
    tell(log, EventKind.CLOSED)
    assert lines() == ["closed; the session is being removed session=s tenant=t"]
    assert not log._last


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MOST_SESSIONS", 3)
    log = EventLog()
    for number in range(5):
        log(SessionKey("t", str(number)), Event(EventKind.TURN, 0.0, {"number": 1}))
    assert [key.session for key in log._last] == ["2", "3", "4"]
