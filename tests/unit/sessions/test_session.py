"""A session folded from events, and its phases."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import groupby, pairwise

import pytest

from soma_vllm.config import Config, parse_config
from soma_vllm.sessions.state.fold import branch_event, fold, inheritance, restore
from soma_vllm.sessions.state.gate import judge
from soma_vllm.sessions.state.phases import MOVING, TRANSITIONS, Phase, after, may_happen
from soma_vllm.sessions.state.session import Session, fresh
from soma_vllm.sessions.state.turn import Turn, turn_event
from soma_vllm.types import AdapterRef, Candidate, Event, Evidence, Role, SessionKey, Usage

KEY = SessionKey("tenant", "s")
CONFIG = parse_config({"warm_window": 3, "acceptance_min_turns": 1, "adaptation": {"max_looks": 100}}, "test")
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
        session = fold(session, turn_event(turn(number), number - 1, 0.0), config.gate)
    return session


def switched(session: Session) -> Session:
    session = fold(session, Event("adaptation_started", 0.0, {"forced": None}), CONFIG.gate)
    data = {"candidate": "adapter", "adapter": asdict(REF), "centroid": [0.1, 0.2]}
    return fold(session, Event("switched", 0.0, data), CONFIG.gate)


def test_the_surrogate_serves_in_phase_switched_only() -> None:
    leading_in = {kind for (_, kind), phase in TRANSITIONS.items() if phase is Phase.SWITCHED}
    assert leading_in == {"switched", "inherited"}
    assert [phase for phase in Phase if (phase, "switched") in TRANSITIONS] == [Phase.ADAPTING]


def test_any_phase_can_be_closed_and_nothing_leaves_closed() -> None:
    assert all(after(phase, "closed") is Phase.CLOSED for phase in Phase)
    assert not any(may_happen(Phase.CLOSED, kind) for kind in MOVING - {"closed"})


def test_a_session_wants_adaptation_when_its_warm_start_is_complete() -> None:
    assert not warm(2).wants_adaptation(CONFIG)
    assert warm(3).wants_adaptation(CONFIG)


def test_a_cut_off_or_empty_answer_does_not_count_as_warm() -> None:
    session = fold(warm(2), turn_event(turn(3, answer=""), 2, 0.0), CONFIG.gate)
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
    back = fold(session, Event("rolled_back", 0.0, {}), CONFIG.gate)
    assert (back.phase, back.serving, back.adapter) == (Phase.ROLLED_BACK, Candidate.ORIGINAL, None)


def test_a_rolled_back_session_is_adapted_again_only_after_new_turns() -> None:
    session = fold(switched(warm()), Event("rolled_back", 0.0, {}), CONFIG.gate)
    assert not session.wants_adaptation(CONFIG)
    for number in range(4, 7):
        session = fold(session, turn_event(turn(number), number - 1, 0.0), CONFIG.gate)
    assert session.wants_adaptation(CONFIG)
    train, held_out = session.examples(CONFIG)
    assert [e.turn for e in train + held_out] == [4, 5, 6]


def test_a_refused_session_is_judged_again_on_its_latest_turns_once_enough_of_them_are_new() -> None:
    session = readmitted(warm(), Candidate.PLAIN, held_out_gap=1.0)
    assert (session.phase, session.refusals) == (Phase.ORIGINAL_ONLY, 1)
    cool_down = CONFIG.adaptation.cool_down_turns
    for _ in range(cool_down - 1):
        session = answered(session)
        assert not session.wants_adaptation(CONFIG)
    session = answered(session)
    assert session.wants_adaptation(CONFIG)
    train, held_out = session.examples(CONFIG)
    assert [e.turn for e in train + held_out] == [4, 5, 6][-CONFIG.warm_window :]
    session = readmitted(session, Candidate.PLAIN, held_out_gap=0.0)
    assert session.phase is Phase.SWITCHED


def test_a_session_that_never_passes_is_judged_ever_more_rarely() -> None:
    states = dialogue(200, 1.0)
    refused = [len(after.turns) for before, after in pairwise(states) if after.refusals > before.refusals]
    spans = [second - first for first, second in pairwise(refused)]
    assert spans == [CONFIG.adaptation.cool_down_turns * 2**count for count in range(len(spans))]
    assert len(refused) >= 5


def test_after_two_setbacks_a_session_stays_with_the_original_until_an_administrator_asks() -> None:
    config = parse_config({"warm_window": 3, "acceptance_min_turns": 1}, "test")
    session = readmitted(warm(), Candidate.PLAIN, held_out_gap=1.0)
    while not session.wants_adaptation(config):
        session = answered(session)
    session = readmitted(session, Candidate.PLAIN, held_out_gap=1.0)
    for _ in range(4 * config.adaptation.cool_down_turns):
        session = answered(session)
    assert session.wants_adaptation(CONFIG)
    assert not session.wants_adaptation(config)
    asked = fold(session, Event("restarted", 0.0, {"reason": "asked"}), config.gate)
    assert asked.wants_adaptation(config)


def test_what_was_refused_must_be_better_to_pass() -> None:
    session = readmitted(warm(), Candidate.PLAIN, held_out_gap=1.0)
    for _ in range(CONFIG.adaptation.cool_down_turns):
        session = answered(session)
    eps = CONFIG.gate.accept_threshold
    assert readmitted(session, Candidate.PLAIN, eps * 0.99).phase is Phase.ORIGINAL_ONLY
    assert readmitted(session, Candidate.PLAIN, eps * CONFIG.gate.readmit_factor).phase is Phase.SWITCHED


def test_a_trainer_that_broke_down_is_waited_for_and_held_against_nobody() -> None:
    session = fold(warm(), Event("adaptation_started", 0.0, {"forced": None}), CONFIG.gate)
    session = fold(
        session, Event("training_failed", 0.0, {"error": "TrainingError", "message": "x"}), CONFIG.gate
    )
    assert (session.cool_downs, session.setbacks) == (1, 0)
    assert not session.wants_adaptation(CONFIG)
    for _ in range(CONFIG.adaptation.cool_down_turns):
        session = answered(session)
    assert session.wants_adaptation(CONFIG)


def test_a_branch_of_a_refused_session_waits_out_its_cool_down() -> None:
    refused = readmitted(warm(), Candidate.PLAIN, held_out_gap=1.0)
    session = branch(refused, refused.turns)
    assert len(session.turns) == 3  # as many as a warm start has
    for _ in range(CONFIG.adaptation.cool_down_turns):
        assert not session.wants_adaptation(CONFIG)
        session = answered(session)
    assert session.wants_adaptation(CONFIG)


def test_an_administrator_need_not_wait_for_a_cool_down() -> None:
    session = readmitted(warm(), Candidate.PLAIN, held_out_gap=1.0)
    session = fold(session, Event("restarted", 0.0, {}), CONFIG.gate)
    assert session.wants_adaptation(CONFIG)
    assert session.setbacks == 1


def test_a_refused_session_whose_words_were_erased_is_left_alone() -> None:
    session = readmitted(warm(), Candidate.PLAIN, held_out_gap=1.0).without_text()
    for _ in range(20):
        session = answered(session)
    assert not session.wants_adaptation(CONFIG)


def test_trainings_are_bounded() -> None:
    session = warm()
    for _ in range(CONFIG.adaptation.max_trainings):
        session = fold(session, Event("training_submitted", 0.0, {}), CONFIG.gate)
    session = fold(switched(session), Event("rolled_back", 0.0, {}), CONFIG.gate)
    for number in range(4, 8):
        session = fold(session, turn_event(turn(number), number - 1, 0.0), CONFIG.gate)
    assert not session.wants_adaptation(CONFIG)


def test_an_event_that_may_not_happen_changes_nothing() -> None:
    session = warm()
    assert fold(session, Event("switched", 0.0, {"candidate": "plain", "centroid": []}), CONFIG.gate) is session


def test_audits_feed_the_drift_monitor_and_mark_their_turn() -> None:
    session = switched(warm())
    session = fold(session, Event("audited", 0.0, {"turn": 2, "gap": 1.5}), CONFIG.gate)
    assert session.turns[1].gap == 1.5
    surprise = {"turn": 3, "kind": "surprise", "gap": None, "surprise": 2.5}
    session = fold(session, Event("audited", 0.0, surprise), CONFIG.gate)
    assert (session.turns[2].gap, session.turns[2].surprise) == (None, 2.5)
    assert [(audit.kind, audit.value) for audit in session.drift.window] == [("gap", 1.5), ("surprise", 2.5)]


def test_a_repeated_request_replaces_its_turn() -> None:
    session = fold(warm(3), turn_event(turn(3, answer="again"), 2, 0.0), CONFIG.gate)
    assert [t.answer for t in session.turns] == ["answer 1", "answer 2", "again"]


def chained(session: Session, turns: int) -> tuple[Turn, ...]:
    """Turns of a session with chains, as the record gives them."""
    return tuple(replace(t, chain=f"chain {t.number}") for t in session.turns[:turns])


def branch(parent: Session, turns: tuple[Turn, ...]) -> Session:
    inherited = inheritance(parent, turns, 0.0)
    events = [branch_event(parent, turns, 0.0), *([] if inherited is None else [inherited])]
    stored = [Event(e.kind, e.at, *json.loads(json.dumps([e.data, e.text]))) for e in events]
    return restore(SessionKey("tenant", "s~1"), stored, CONFIG.gate)


def test_a_branch_that_shares_what_was_learned_from_is_served_by_the_same_adapter() -> None:
    parent = switched(warm())
    parent = replace(parent, turns=chained(parent, 3), family="s")
    session = branch(parent, parent.turns)
    assert (session.phase, session.adapter, session.learned) == (Phase.SWITCHED, REF, 3)
    assert (session.turns, session.family) == (parent.turns, "s")


@pytest.mark.parametrize("common", [0, 1, 2])
def test_a_branch_without_a_turn_that_was_learned_from_begins_its_own_warm_start(common: int) -> None:
    parent = switched(warm())
    parent = replace(parent, turns=chained(parent, 3))
    session = branch(parent, parent.turns[:common])
    assert (session.phase, session.adapter, len(session.turns)) == (Phase.WARM_START, None, common)


def test_a_branch_whose_learned_turn_was_answered_otherwise_inherits_nothing() -> None:
    parent = switched(warm())
    parent = replace(parent, turns=chained(parent, 3))
    other = (*parent.turns[:2], replace(parent.turns[2], chain="another"))
    assert branch(parent, other).phase is Phase.WARM_START


def test_text_is_beside_the_record_of_a_turn_and_never_in_it() -> None:
    event = turn_event(turn(1, answer="the answer", query="the question"), 0, 0.0)
    assert event.text is not None
    assert "the " not in json.dumps(event.data)
    silent = restore(KEY, [replace(event, text=None)], CONFIG.gate)
    assert not silent.kept()
    assert silent.turns[0].teaches()


def test_why_a_turn_teaches_nothing_is_known_without_its_text() -> None:
    event = turn_event(turn(1, answer=" "), 0, 0.0)
    assert (
        restore(KEY, [replace(event, text=None)], CONFIG.gate).turns[0].unteachable() == "its answer is empty"
    )


def test_an_asked_for_adaptation_learns_from_every_turn_again() -> None:
    session = fold(switched(warm()), Event("restarted", 0.0, {}), CONFIG.gate)
    assert (session.phase, session.adapter, session.learned) == (Phase.WARM_START, None, 0)
    assert session.wants_adaptation(CONFIG)


def test_a_pinned_session_is_not_adapted() -> None:
    session = fold(warm(), Event("pinned", 0.0, {"engine": "original"}), CONFIG.gate)
    assert not session.wants_adaptation(CONFIG)
    assert fold(session, Event("pinned", 0.0, {"engine": None}), CONFIG.gate).wants_adaptation(CONFIG)


def test_the_event_log_alone_restores_a_session() -> None:
    events = [turn_event(turn(n), n - 1, 0.0) for n in (1, 2, 3)]
    events += [
        Event("adaptation_started", 1.0, {"forced": "adapter"}),
        Event("training_submitted", 1.0, {}),
        Event("switched", 2.0, {"candidate": "adapter", "adapter": asdict(REF), "centroid": [1.0]}),
        Event("audited", 3.0, {"turn": 3, "gap": 0.25}),
    ]
    session = fresh(KEY)
    for event in events:
        session = fold(session, event, CONFIG.gate)
    stored = [Event(e.kind, e.at, *json.loads(json.dumps([e.data, e.text]))) for e in events]
    assert restore(KEY, stored, CONFIG.gate) == session


def answered(session: Session, engine: Role = Role.ORIGINAL) -> Session:
    number = len(session.turns) + 1
    return fold(session, turn_event(turn(number, engine), number - 1, 0.0), CONFIG.gate)


def audited(session: Session, value: float) -> Session:
    """The session after one audit, rolled back where that demands it."""
    session = fold(session, Event("audited", 0.0, {"turn": 1, "kind": "gap", "gap": value}), CONFIG.gate)
    if not session.drift.demands_rollback(CONFIG.gate):
        return session
    return fold(session, Event("rolled_back", 0.0, {}), CONFIG.gate)


def readmitted(session: Session, candidate: Candidate, held_out_gap: float) -> Session:
    """The session after the adaptation it wants: judged by the gate, switched or refused."""
    session = fold(session, Event("adaptation_started", 0.0, {"forced": None}), CONFIG.gate)
    found = [Evidence(candidate, (held_out_gap,), (1,), None)]
    verdict = judge(found, CONFIG.gate, 1, setbacks=session.setbacks)
    if verdict.candidate is Candidate.ORIGINAL:
        return fold(session, Event("refused", 0.0, {"found_wanting": True}), CONFIG.gate)
    ref = asdict(REF) if candidate is Candidate.ADAPTER else None
    data = {"candidate": verdict.candidate, "adapter": ref, "centroid": [0.1]}
    return fold(session, Event("switched", 0.0, data), CONFIG.gate)


def dialogue(turns: int, held_out_gap: float, candidate: Candidate = Candidate.PLAIN) -> list[Session]:
    """A session whose held-out turns always look alike and whose audits go bad once it serves, turn by turn."""
    session = Session(KEY)
    states = []
    for _ in range(turns):
        if session.phase is Phase.SWITCHED:
            # A good audit now and then does not save it: the moving mean stays above the threshold.
            session = audited(answered(session, Role.SURROGATE), 0.0 if len(session.turns) % 5 == 4 else 1.9)
        else:
            session = answered(session)
            if session.wants_adaptation(CONFIG):
                session = readmitted(session, candidate, held_out_gap)
        states.append(session)
    return states


@pytest.mark.parametrize("candidate", [Candidate.PLAIN, Candidate.ADAPTER])
def test_a_session_that_looks_well_and_does_badly_flaps_ever_more_rarely(candidate: Candidate) -> None:
    states = dialogue(200, 0.0, candidate)
    assert 2 <= states[-1].switches <= 7  # every stay with the original is twice as long: log2(200 / 3)
    spans = [list(group) for phase, group in groupby(states, lambda s: s.phase) if phase is Phase.ROLLED_BACK]
    lengths = [len(span) for span in spans[:-1]]
    assert lengths == [3 * 2**count for count in range(len(lengths))]


def test_a_session_that_was_good_enough_once_is_not_good_enough_for_ever() -> None:
    states = dialogue(200, 0.085)  # passes 0.12 and 0.096, not 0.0768
    assert states[-1].phase is Phase.ORIGINAL_ONLY
    assert states[-1].switches == 2


def test_within_the_cool_down_nothing_is_adapted_whatever_the_client_repeats() -> None:
    session = fold(switched(warm()), Event("rolled_back", 0.0, {}), CONFIG.gate)
    for _ in range(CONFIG.adaptation.cool_down_turns - 1):
        session = answered(session)
        repeated = turn(len(session.turns), answer="again")
        session = fold(session, turn_event(repeated, len(session.turns) - 1, 0.0), CONFIG.gate)
        assert not session.wants_adaptation(CONFIG)
    assert answered(session).wants_adaptation(CONFIG)


def test_a_branch_does_not_wash_rollbacks_away() -> None:
    parent = fold(switched(warm()), Event("rolled_back", 0.0, {}), CONFIG.gate)
    assert branch(parent, ()).rollbacks == 1
    refused = readmitted(warm(), Candidate.PLAIN, held_out_gap=1.0)
    assert branch(refused, ()).refusals == 1


@pytest.mark.parametrize("phase", list(Phase))
def test_every_transition_stays_inside_the_table(phase: Phase) -> None:
    for kind in MOVING:
        if may_happen(phase, kind):
            assert after(phase, kind) in Phase
