"""How much time is left, from what was expected and what was seen: by fake clocks, without a sleep."""

from __future__ import annotations

from dataclasses import replace

import pytest

from soma_vllm.tools.replay.pace import LEAST_PATIENCE_S, Expected, Rules, Timekeeper, makespan
from soma_vllm.tools.replay.replay_view import SessionRecord, TurnRecord
from soma_vllm.types import Role

EXPECTED = Expected(original_s=10.0, surrogate_s=2.0, training_s=60.0)
RULES = Rules(warm_window=4)


class Clock:
    """Goes when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def record(name: str, done: int, planned: int = 10, phase: str = "WARM_START", **more: bool) -> SessionRecord:
    turn = TurnRecord(0, "", "", "original", None, phase, "", 0.0, None, 1.0)
    turns = tuple(replace(turn, turn=number) for number in range(1, done + 1))
    return SessionRecord(name, name, planned, phase=phase if done else "", turns=turns, **more)


@pytest.mark.parametrize(
    ("seconds", "lanes", "end"), [([3, 3, 3], 1, 9), ([5, 1, 1, 1], 2, 5), ([4, 4, 4], 2, 8), ([], 3, 0)]
)
def test_each_dialogue_goes_to_the_first_free_lane(seconds: list[float], lanes: int, end: float) -> None:
    assert makespan(seconds, lanes) == end


def test_before_anything_was_seen_the_expectation_holds() -> None:
    watch = Timekeeper(RULES, EXPECTED)
    assert watch.turn_s(Role.ORIGINAL) == 10.0
    assert watch.turn_s(Role.SURROGATE) == 2.0
    assert watch.training_s() == 60.0


def test_what_is_seen_of_one_engine_corrects_what_is_expected_of_the_other() -> None:
    watch = Timekeeper(RULES, EXPECTED)
    watch.turn("original", 15.0)
    watch.turn("original", 25.0)
    assert watch.turn_s(Role.ORIGINAL) == 20.0
    assert watch.turn_s(Role.SURROGATE) == 4.0
    assert watch.training_s() == 120.0
    watch.turn("surrogate", 3.0)
    assert watch.turn_s(Role.SURROGATE) == 3.0
    watch.training("a", 45.0)
    assert watch.training_s() == 45.0


def test_nothing_is_said_where_nothing_is_known() -> None:
    watch = Timekeeper(RULES)
    assert watch.turn_s(Role.ORIGINAL) is None
    assert watch.left_s([record("a", 0)]) is None


def test_a_dialogue_takes_its_warm_turns_by_the_original_and_the_rest_by_whoever_serves() -> None:
    watch = Timekeeper(RULES, EXPECTED)
    assert watch.dialogue_s(record("a", 2, phase="WARM_START")) == pytest.approx(
        2 * 10 + 6 * (0.6 * 2 + 0.4 * 10)
    )
    assert watch.dialogue_s(record("a", 6, phase="SWITCHED")) == pytest.approx(4 * 2)
    assert watch.dialogue_s(record("a", 6, phase="ROLLED_BACK")) == pytest.approx(4 * 10)
    assert watch.dialogue_s(record("a", 10, phase="SWITCHED")) == 0


def test_the_first_turn_of_a_dialogue_has_a_time_of_its_own() -> None:
    watch = Timekeeper(RULES, replace(EXPECTED, opening_s=30.0))
    assert watch.dialogue_s(record("a", 0, planned=2)) == pytest.approx(30 + 10)
    watch.turn("original", 5.0)
    assert watch.dialogue_s(record("a", 0, planned=2)) == pytest.approx(15 + 5)
    watch.turn("original", 50.0, opening=True)
    assert watch.turn_s(Role.ORIGINAL) == 5.0
    assert watch.dialogue_s(record("a", 0, planned=2)) == pytest.approx(50 + 5)
    assert watch.dialogue_s(record("a", 1, planned=2)) == pytest.approx(5)


def test_a_forced_dialogue_waits_for_its_training_and_then_has_the_surrogate() -> None:
    watch = Timekeeper(RULES, EXPECTED)
    assert watch.dialogue_s(record("a", 4, phase="ADAPTING", forced=True)) == pytest.approx(60 + 6 * 2)
    assert watch.dialogue_s(record("a", 4, phase="SWITCHED", forced=True)) == pytest.approx(6 * 2)


def test_time_to_think_counts_and_a_dialogue_left_out_takes_none() -> None:
    watch = Timekeeper(Rules(warm_window=4, think_s=1.5), EXPECTED)
    assert watch.dialogue_s(record("a", 9, phase="SWITCHED")) == pytest.approx(2 + 1.5)
    assert watch.dialogue_s(record("a", 0, left_out=True)) == 0


def test_what_is_left_is_laid_out_on_lanes_with_what_has_begun_first() -> None:
    watch = Timekeeper(Rules(warm_window=4, lanes=2), EXPECTED)
    begun = record("b", 9, phase="SWITCHED")
    fresh = record("a", 0, planned=1)
    assert watch.left_s([fresh, begun]) == 10.0
    assert watch.left_s([fresh, fresh, begun]) == 12.0


def test_a_dialogue_begins_only_if_it_would_be_over_in_time() -> None:
    clock = Clock()
    watch = Timekeeper(Rules(warm_window=4), EXPECTED, deadline=100.0, always=["kept"], clock=clock)
    sessions = {"kept": record("kept", 3, planned=4), "b": record("b", 0, planned=4)}
    assert watch.may_begin("b", sessions, {"kept"})
    clock.now = 55.0  # 10 s of the one under way and 40 s of its own
    assert not watch.may_begin("b", sessions, {"kept"})
    assert watch.may_begin("kept", sessions, {"kept"})


def test_what_is_known_better_may_let_a_dialogue_begin_after_all() -> None:
    clock = Clock()
    watch = Timekeeper(Rules(warm_window=4), EXPECTED, deadline=100.0, clock=clock)
    sessions = {"a": record("a", 3, planned=4), "b": record("b", 0, planned=4)}
    clock.now = 55.0
    assert not watch.may_begin("b", sessions, {"a"})
    watch.turn("original", 4.0)
    assert watch.may_begin("b", sessions, {"a"})


def test_one_slow_first_turn_does_not_spoil_the_pace() -> None:
    watch = Timekeeper(RULES, EXPECTED)
    for seconds in (40.0, 1.0, 1.2):
        watch.turn("original", seconds)
    assert watch.turn_s(Role.ORIGINAL) == 1.2


def test_without_a_deadline_everything_begins() -> None:
    assert Timekeeper(RULES, EXPECTED).may_begin("a", {"a": record("a", 0)}, ())


def test_patience_grows_with_the_longest_thing_seen_and_with_those_who_wait_for_a_trainer() -> None:
    watch = Timekeeper(RULES, EXPECTED)
    assert watch.patience_s(1) == 360.0
    assert watch.patience_s(3) == 1080.0
    watch.training("a", 200.0)
    assert watch.patience_s(1) == 1200.0
    watch.turn("original", 400.0)
    assert watch.patience_s(1) == 2400.0


def test_patience_has_a_least_and_where_nothing_is_known_the_servers_own_limit() -> None:
    assert Timekeeper(RULES, Expected(0.1, 0.1, 0.5)).patience_s(1) == LEAST_PATIENCE_S
    assert Timekeeper(Rules(4, training_limit_s=500.0)).patience_s(2) == 1000.0


def test_every_turn_is_news() -> None:
    clock = Clock()
    watch = Timekeeper(RULES, EXPECTED, clock=clock)
    clock.now = 30.0
    assert watch.nothing_for_s() == 30.0
    watch.turn("surrogate", 1.0)
    assert watch.nothing_for_s() == 0.0
