"""Recognising a history from which its client dropped turns."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.sessions.state.transcript import TranscriptDigest, read
from soma_vllm.sessions.state.truncated_history import Overlap, trimmed

SYSTEM = {"role": "system", "content": "You are terse."}
Messages = list[dict[str, Any]]


def exchange(number: int | str) -> Messages:
    return [{"role": "user", "content": f"q{number}"}, {"role": "assistant", "content": f"a{number}"}]


def asked(*exchanges: int | str, system: dict[str, str] = SYSTEM, drop: int = 0) -> TranscriptDigest:
    """A system message, what is left of these exchanges, and a query."""
    said = [message for number in exchanges for message in exchange(number)][drop:]
    return read("t", [system, *said, {"role": "user", "content": "next"}])


def record(turns: int) -> list[list[str]]:
    return [[mark.link] for mark in asked(*range(1, turns + 1)).marks]


def test_the_latest_turns_are_recognised_as_the_end_of_the_record() -> None:
    assert trimmed(record(6), asked(5, 6)) == Overlap(6, 5, (0, 4))


def test_a_history_cut_to_a_number_of_messages_is_recognised_by_what_is_whole() -> None:
    assert trimmed(record(6), asked(4, 5, 6, drop=1)) == Overlap(6, 6, (0, 4))
    assert trimmed(record(6), asked("4*", 5, 6, drop=1)) is None
    assert trimmed(record(6), asked("4*", 5, 6)) is None


def test_the_first_turns_may_be_kept_with_the_last_ones() -> None:
    assert trimmed(record(6), asked(1, 2, 5, 6)) == Overlap(6, 9, (2, 4))


def test_an_answer_that_was_edited_ends_the_overlap_before_it() -> None:
    assert trimmed(record(6), asked(4, 5, "6*")) == Overlap(5, 5, (0, 3))
    assert trimmed(record(6), asked("5*", 6)) is None


def test_turns_in_another_order_are_not_recognised() -> None:
    assert trimmed(record(2), asked(2, 1)) is None
    assert trimmed(record(6), asked(6, 5)) is None


def test_turns_that_a_killed_server_did_not_record_may_follow_the_records_end() -> None:
    assert trimmed(record(5), asked(4, 5, "lost")) == Overlap(5, 5, (0, 3))


def test_the_system_message_is_no_part_of_what_is_compared() -> None:
    other = {"role": "system", "content": "You are verbose."}
    assert trimmed(record(6), asked(5, 6, system=other)) == Overlap(6, 5, (0, 4))


def test_a_turn_of_several_exchanges_is_left_out_as_one() -> None:
    links = [link for turn in record(5) for link in turn]
    assert trimmed([links[:3], links[3:4], links[4:]], asked(3, 4, 5)) == Overlap(3, 7, (0, 1))


@given(st.integers(1, 8), st.data())
def test_a_run_of_turns_that_was_left_out_is_told_exactly(turns: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, turns - 1))
    last = data.draw(st.integers(first, turns - 1))
    kept = [number for number in range(1, turns + 1) if not first < number <= last]
    overlap = trimmed(record(turns), asked(*kept))
    assert overlap == Overlap(turns, 1 + 2 * len(kept), (first, last) if first < last else None)


@given(st.integers(2, 8), st.data())
def test_an_edit_in_what_was_kept_is_never_taken_for_the_records_end(turns: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(1, turns))
    edited = data.draw(st.integers(begin, turns))
    kept = [number if number != edited else f"{number}*" for number in range(begin, turns + 1)]
    overlap = trimmed(record(turns), asked(*kept))
    assert overlap is None or overlap.turns < edited
