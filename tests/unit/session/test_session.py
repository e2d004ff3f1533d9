"""A session folded from events, and its phases."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from soma_vllm.config import Config, parse_config
from soma_vllm.session.phases import MOVING, TRANSITIONS, Phase, after, may_happen
from soma_vllm.session.session import Session, Turn, fold, restore, turn_event
from soma_vllm.types import AdapterRef, Candidate, Event, Role, SessionKey, Usage

KEY = SessionKey("tenant", "s")
CONFIG = parse_config({"warm_window": 3, "acceptance_min_turns": 1}, "test")
REF = AdapterRef("soma-x-v0001-1", 1, "adapters/x")


def turn(
    number: int, engine: Role = Role.ORIGINAL, answer: str | None = None, query: str | None = None
) -> Turn:
    return Turn(
        number=number,
        messages=({"role": "user", "content": query or f"question {number}"},),
        answer=f"answer {number}" if answer is None else answer,
        engine=engine,
        adapter=None,
        phase=Phase.WARM_START,
        reason="test",
        usage=Usage(),
        ttft_s=None,
        latency_s=0.1,
    )


def warm(turns: int = 3, config: Config = CONFIG) -> Session:
    session = Session(KEY)
    for number in range(1, turns + 1):
        session = fold(session, turn_event(turn(number), number - 1, 0.0), config)
    return session


def switched(session: Session) -> Session:
    session = fold(session, Event("adaptation_started", 0.0, {"forced": None}), CONFIG)
    data = {"candidate": "adapter", "adapter": asdict(REF), "centroid": [0.1, 0.2]}
    return fold(session, Event("switched", 0.0, data), CONFIG)


def test_the_surrogate_serves_in_phase_switched_only() -> None:
    leading_in = {kind for (_, kind), phase in TRANSITIONS.items() if phase is Phase.SWITCHED}
    assert leading_in == {"switched"}
    assert [phase for phase in Phase if (phase, "switched") in TRANSITIONS] == [Phase.ADAPTING]


def test_any_phase_can_be_closed_and_nothing_leaves_closed() -> None:
    assert all(after(phase, "closed") is Phase.CLOSED for phase in Phase)
    assert not any(may_happen(Phase.CLOSED, kind) for kind in MOVING - {"closed"})


def test_a_session_wants_adaptation_when_its_warm_start_is_complete() -> None:
    assert not warm(2).wants_adaptation(CONFIG)
    assert warm(3).wants_adaptation(CONFIG)


def test_a_cut_off_or_empty_answer_does_not_count_as_warm() -> None:
    session = fold(warm(2), turn_event(turn(3, answer=""), 2, 0.0), CONFIG)
    assert not session.wants_adaptation(CONFIG)


def test_held_out_turns_are_never_trained_on() -> None:
    train, held_out = warm(3).examples(CONFIG)
    assert [e.turn for e in train] == [1, 2]
    assert [e.turn for e in held_out] == [3]


def test_an_example_carries_the_whole_history_before_its_answer() -> None:
    (_, second), _ = warm(3).examples(CONFIG)
    assert [m["content"] for m in second.messages] == ["question 1", "answer 1", "question 2"]


def test_examples_are_taken_under_the_prefix_that_will_be_served() -> None:
    config = parse_config(
        {
            "warm_window": 6,
            "acceptance_min_turns": 1,
            "compressed_prefix_turns": 1,
            "prefix": {"mode": "sliding"},
        },
        "test",
    )
    _, (last,) = warm(6, config).examples(config)
    assert len(last.messages) == 3
    assert "Earlier in this conversation" in last.messages[0]["content"]


def test_switching_sets_the_adapter_and_rolling_back_clears_it() -> None:
    session = switched(warm())
    assert (session.phase, session.serving, session.adapter) == (Phase.SWITCHED, Candidate.ADAPTER, REF)
    back = fold(session, Event("rolled_back", 0.0, {}), CONFIG)
    assert (back.phase, back.serving, back.adapter) == (Phase.ROLLED_BACK, Candidate.ORIGINAL, None)


def test_a_rolled_back_session_is_adapted_again_only_after_new_turns() -> None:
    session = fold(switched(warm()), Event("rolled_back", 0.0, {}), CONFIG)
    assert not session.wants_adaptation(CONFIG)
    for number in range(4, 7):
        session = fold(session, turn_event(turn(number), number - 1, 0.0), CONFIG)
    assert session.wants_adaptation(CONFIG)
    train, held_out = session.examples(CONFIG)
    assert [e.turn for e in train + held_out] == [4, 5, 6]


def test_trainings_are_bounded() -> None:
    session = warm()
    for _ in range(CONFIG.adaptation.max_trainings):
        session = fold(session, Event("training_submitted", 0.0, {}), CONFIG)
    session = fold(switched(session), Event("rolled_back", 0.0, {}), CONFIG)
    for number in range(4, 8):
        session = fold(session, turn_event(turn(number), number - 1, 0.0), CONFIG)
    assert not session.wants_adaptation(CONFIG)


def test_an_event_that_may_not_happen_changes_nothing() -> None:
    session = warm()
    assert fold(session, Event("switched", 0.0, {"candidate": "plain", "centroid": []}), CONFIG) is session


def test_audits_feed_the_drift_monitor_and_mark_their_turn() -> None:
    session = switched(warm())
    session = fold(session, Event("audited", 0.0, {"turn": 2, "gap": 1.5}), CONFIG)
    assert session.turns[1].gap == 1.5
    surprise = {"turn": 3, "kind": "surprise", "gap": None, "surprise": 2.5}
    session = fold(session, Event("audited", 0.0, surprise), CONFIG)
    assert session.turns[2].gap is None
    assert [(audit.kind, audit.value) for audit in session.drift.window] == [("gap", 1.5), ("surprise", 2.5)]


def test_a_repeated_request_replaces_its_turn() -> None:
    session = fold(warm(3), turn_event(turn(3, answer="again"), 2, 0.0), CONFIG)
    assert [t.answer for t in session.turns] == ["answer 1", "answer 2", "again"]


def test_rewinding_forgets_what_was_learned() -> None:
    session = fold(switched(warm()), Event("rewound", 0.0, {"to": 1}), CONFIG)
    assert session.phase is Phase.WARM_START
    assert session.adapter is None
    assert len(session.turns) == 1


def test_the_event_log_alone_restores_a_session() -> None:
    events = [turn_event(turn(n), n - 1, 0.0) for n in (1, 2, 3)]
    events += [
        Event("adaptation_started", 1.0, {"forced": "adapter"}),
        Event("training_submitted", 1.0, {}),
        Event("switched", 2.0, {"candidate": "adapter", "adapter": asdict(REF), "centroid": [1.0]}),
        Event("audited", 3.0, {"turn": 3, "gap": 0.25}),
    ]
    session = Session(KEY)
    for event in events:
        session = fold(session, event, CONFIG)
    stored = [Event(e.kind, e.at, json.loads(json.dumps(e.data))) for e in events]
    assert restore(KEY, stored, CONFIG) == session


@pytest.mark.parametrize("phase", list(Phase))
def test_every_transition_stays_inside_the_table(phase: Phase) -> None:
    for kind in MOVING:
        if may_happen(phase, kind):
            assert after(phase, kind) in Phase
