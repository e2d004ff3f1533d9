"""Strips, summary, expectations and the figure, from a synthetic replay."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from soma_vllm.config import Config
from soma_vllm.tools.replay import replay_view as view
from soma_vllm.tools.replay import timeline
from soma_vllm.tools.replay.expectations import Expectation, unmet
from soma_vllm.tools.replay.replay import write_log
from soma_vllm.tools.replay.replay_view import SessionRecord, TurnRecord

CODES = {
    "O": ("original", None, "WARM_START"),
    "s": ("surrogate", None, "SWITCHED"),
    "A": ("surrogate", "a1", "SWITCHED"),
    "l": ("original", None, "SWITCHED"),
    "x": ("original", None, "ROLLED_BACK"),
}


def session(dialogue: str, letters: str, planned: int | None = None) -> SessionRecord:
    """A session whose turns take 2 s by the original and 0.5 s by the surrogate, one every 10 s from 100 on."""
    turns = []
    for number, letter in enumerate(letters, start=1):
        engine, adapter, phase = CODES[letter]
        turns.append(
            TurnRecord(
                turn=number,
                query="secret question",
                answer="secret answer",
                engine=engine,
                adapter=adapter,
                phase=phase,
                reason="",
                at=90.0 + 10.0 * number,
                ttft_s=0.1,
                latency_s=2.0 if engine == "original" else 0.5,
            )
        )
    return SessionRecord(
        dialogue, f"{dialogue}-1", planned or len(letters), phase="SWITCHED", turns=tuple(turns)
    )


def shown(records: list[SessionRecord], width: int = 140) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(view.table(records))
    return out.getvalue()


def test_the_strip_tells_who_answered_each_turn_and_what_is_to_come() -> None:
    assert view.strip(session("a", "OOsAlx", planned=8)) == "OOsAlx··"


def test_the_strip_marks_where_a_dialogue_broke_off() -> None:
    assert view.strip(replace(session("a", "OO", planned=5), error="gone")) == "OO!··"


def test_the_table_shows_medians_by_engine_and_no_conversation() -> None:
    text = shown([replace(session("a", "OOAA"), forced=True)])
    assert "a (forced)" in text
    assert "OOAA" in text
    assert "2.00 s" in text
    assert "0.50 s" in text
    assert "secret" not in text


def test_a_row_of_the_demo_fits_80_columns_on_one_line() -> None:
    slow = replace(session("house-style", "OOOOAAAAAAxx"), forced=True, phase="ORIGINAL_ONLY")
    slow = replace(slow, turns=tuple(replace(turn, latency_s=123.45, gap=0.125) for turn in slow.turns))
    row = next(line for line in shown([slow], width=80).splitlines() if "house-style" in line)
    assert " ".join(row.split()) == "house-style (forced) OOOOAAAAAAxx ORIGINAL_ONLY 123.45 s 123.45 s 0.125"


def test_a_name_too_long_for_the_table_folds_and_nothing_is_cut() -> None:
    lines = shown([session("n" * 64, "OOAA")], width=80).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert sum(line.count("n") for line in lines if line.startswith("nn")) == 64
    assert any("OOAA" in line and "2.00 s" in line and "0.50 s" in line for line in lines)


def test_the_summary_counts_turns_and_names_sessions() -> None:
    records = [session("one", "OOss"), replace(session("two", "OOAx"), forced=True), session("three", "OO")]
    lines = view.summary(records)
    assert lines[0] == (
        "3 sessions, 10 turns: 7 by the original, 3 by the surrogate, 1 of these with an adapter"
    )
    assert "switched: one, two" in lines
    assert "served with an adapter: two" in lines
    assert "rolled back: two" in lines
    assert "median latency: original 2.00 s, surrogate 0.50 s" in lines
    assert "forced to their adapter, whatever the gate decided: two" in lines


def test_the_mean_gap_takes_audited_turns_only() -> None:
    record = session("a", "OAA")
    turns = (record.turns[0], replace(record.turns[1], gap=0.25), record.turns[2])
    assert "mean audited gap: 0.250" in view.summary([replace(record, turns=turns)])


@pytest.mark.parametrize(
    ("letters", "missing"),
    [
        ("OOOO", ["switch", "adapter", "rollback"]),
        ("OOss", ["adapter", "rollback"]),
        ("OOAA", ["rollback"]),
        ("OOAx", []),
    ],
)
def test_expectations_that_no_session_meets_are_named(letters: str, missing: list[str]) -> None:
    lines = unmet(list(Expectation), [session("a", letters), session("b", "OO")])
    named = [line.split(":")[0].removeprefix("expected ") for line in lines if line.startswith("expected ")]
    assert named == missing


def test_a_roll_back_after_the_last_turn_counts() -> None:
    record = replace(session("a", "OOAA"), events=({"kind": "rolled_back", "at": 150.0, "data": {}},))
    assert unmet([Expectation.ROLLBACK], [record]) == []


def test_nothing_is_expected_unless_asked() -> None:
    assert unmet([], [session("a", "OO")]) == []


def test_a_missed_adapter_says_what_became_of_the_training_and_what_to_do() -> None:
    events = ({"kind": "training_submitted", "at": 110.0, "data": {}},)
    waiting = replace(
        session("a", "OOOO"),
        forced=True,
        events=events,
        given_up="gave up waiting for its verdict: nothing happened for 900 s",
    )
    assert unmet([Expectation.ADAPTER], [waiting, session("b", "OO")]) == [
        "expected adapter: found no session with a turn answered with an adapter",
        "  seen: a: gave up waiting for its verdict: nothing happened for 900 s",
        "  what to do: give it more time, with nothing else on the machine: --minutes 40, or fewer dialogues "
        "by --only",
    ]


def test_a_missed_switch_quotes_the_gate() -> None:
    events = ({"kind": "refused", "at": 110.0, "data": {"reason": "plain: gap 0.245 above 0.12"}},)
    lines = unmet([Expectation.SWITCH], [replace(session("a", "OOOO"), events=events)])
    assert lines[1] == "  seen: a: refused: plain: gap 0.245 above 0.12"
    assert "gate.accept_threshold" in lines[2]


def test_a_missed_roll_back_counts_audits_and_blames_those_that_were_dropped() -> None:
    events = tuple({"kind": kind, "at": 110.0, "data": {}} for kind in ("audited", "audit_dropped"))
    lines = unmet([Expectation.ROLLBACK], [replace(session("a", "OOss"), events=events), session("b", "OO")])
    assert lines[1:] == [
        "  seen: a: 1 audits, 1 dropped",
        "  what to do: give audits time: --set gate.audit_wait_s=600",
    ]


def test_progress_counts_turns_and_tells_the_time_that_is_left() -> None:
    sessions = [session("a", "OO", planned=4), replace(session("b", "", planned=9), left_out=True)]
    assert view.progress(sessions, 170.0) == "2 of 4 turns, about 3 min left"
    assert view.progress(sessions, 23.0) == "2 of 4 turns, 20 s left"
    assert view.progress(sessions, None) == "2 of 4 turns"
    assert view.progress([session("a", "OO")], 0.0) == "2 of 2 turns"


def test_a_dialogue_that_was_left_out_is_shown_as_such_and_is_no_session() -> None:
    records = [session("a", "OO"), replace(session("b", "", planned=3), left_out=True)]
    assert "left out" in shown(records)
    lines = view.summary(records)
    assert lines[0].startswith("1 sessions, 2 turns")
    assert "left out for want of time: b" in lines


def test_a_turn_is_told_with_what_is_left_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    screen = view.Screen(Console(file=out, width=140))
    screen.left_s = lambda: 31.0
    with screen.live({"a": session("a", "", planned=3)}):
        screen.show(session("a", "O", planned=3))
        screen.show(replace(session("a", "O", planned=3), phase="ADAPTING"))
        screen.show(replace(session("a", "O", planned=3), phase="SWITCHED"))
    assert out.getvalue().splitlines() == [
        "a turn 1/3: original, 2.00 s, WARM_START  (1 of 3 turns, 30 s left)",
        "a: has its verdict, SWITCHED",
    ]


def test_moments_map_to_the_axis_of_turns() -> None:
    turns = session("a", "OOO").to_json()["turns"]
    assert timeline.position(turns, 50.0) == 0.5
    assert timeline.position(turns, 111.0) == pytest.approx(2.0)
    assert timeline.position(turns, 115.0) == 2.5


def test_a_training_spans_from_its_submission_to_its_end() -> None:
    turns = session("a", "OOO").to_json()["turns"]
    events = [
        {"kind": "training_submitted", "at": 103.0, "data": {}},
        {"kind": "of another day", "at": 105.0, "data": {}},
        {"kind": "trained", "at": 121.0, "data": {}},
        {"kind": "training_submitted", "at": 123.0, "data": {}},
    ]
    assert timeline.training_spans(turns, events) == [(1.5, pytest.approx(3.0)), (3.5, 3.5)]
    assert timeline.trainings(events) == [(103.0, 121.0), (123.0, None)]


def test_the_figure_is_a_small_png_drawn_from_the_log_alone(tmp_path: Path) -> None:
    events = (
        {"kind": "training_submitted", "at": 111.0, "data": {}},
        {"kind": "trained", "at": 118.0, "data": {}},
        {"kind": "switched", "at": 119.0, "data": {}},
        {"kind": "rolled_back", "at": 149.0, "data": {}},
    )
    records = [
        replace(session("a", "OOAAlx"), events=events),
        session("b", "OOss"),
        session("c", "", planned=3),
    ]
    log = write_log(tmp_path / "soma_log.json", Config(), records)
    timeline.draw(log, tmp_path / "timeline.png")
    data = (tmp_path / "timeline.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(data) < 300_000
