"""What a study must have seen to be reported, how answers are compared, and where its tables go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from marked import replace_marked
from study.client import Answered, Played
from study.cost import Counting
from study.fidelity import compare, summary
from study.meter import Reading
from study.plan import Block, Visit
from study.report import (
    IncompleteRun,
    Measured,
    check,
    percentiles,
    rankings,
    switched_latency,
)
from study.table import markdown

import soma_vllm
from soma_vllm.types import Gap

ROOT = Path(soma_vllm.__file__).parent.parent

VISIT = Visit("v", "d", ("one", "two", "three"), 0.0, (0.0, 0.0))


def played(*answers: str, engine: str = "original", error: str | None = None) -> Any:
    turns = tuple(
        Answered(n, engine, None, "", 0.0, 0.1, 1.0, 10, 5, None, answer) for n, answer in enumerate(answers, 1)
    )
    return Played(VISIT, turns, (), error)


def measured(arm: str, one: Any) -> Any:
    return Measured.of(Block(0, arm, (VISIT,)), [one], 1.0, Reading(1.0, {}, {}, {}), {}, Counting())


def gaps(pairs: Sequence[tuple[str, str]]) -> list[Gap]:
    """Of other answers 1."""
    return [Gap(float(a != b)) for a, b in pairs]


def test_a_run_with_all_its_turns_passes() -> None:
    one = measured("original", played("a", "b", "c"))
    check([one], [one.block])


def test_a_missing_turn_fails_the_run() -> None:
    one = measured("original", played("a", "b", error="BrokenOff: gone"))
    with pytest.raises(IncompleteRun) as caught:
        check([one], [one.block])
    assert "found 2 turns; expected 3" in str(caught.value)
    assert "BrokenOff: gone" in str(caught.value)


def test_a_missing_block_fails_the_run() -> None:
    one = measured("original", played("a", "b", "c"))
    with pytest.raises(IncompleteRun, match="found 1 blocks in their order; expected 2"):
        check([one], [one.block, Block(0, "soma", (VISIT,))])


def test_an_original_s_arm_that_the_surrogate_answered_fails_the_run() -> None:
    one = measured("original", played("a", "b", "c", engine="surrogate"))
    with pytest.raises(IncompleteRun, match="was answered by surrogate"):
        check([one], [one.block])


def test_only_turns_after_the_warm_start_are_compared() -> None:
    found = compare([played("no", "yes", "no", engine="surrogate")], [played("yes", "yes", "yes")], 1, gaps)
    assert [(one.turn, one.gap) for one in found] == [(2, 0.0), (3, 1.0)]


def test_fidelity_is_told_relative_to_the_gate_s_promise() -> None:
    found = compare([played("no", "yes", "no", engine="surrogate")], [played("yes", "yes", "yes")], 1, gaps)
    numbers = summary(found, promise=0.8)
    assert numbers["fidelity"] == 0.5
    assert numbers["fidelity_over_promise"] == 0.625
    assert numbers["fidelity_of_surrogate_turns"] == 0.5
    assert numbers["same_words"] == 0.5


def test_what_idling_takes_anyway_is_not_an_arm_s() -> None:
    before, after = Reading(1.0, {"server": 1.0}, {}, {}), Reading(11.0, {"server": 4.0}, {}, {})
    assert after.since(before, {"server": 0.1}).cpu_s == {"server": 2.0}
    assert after.since(before, {"server": 9.0}).cpu_s == {"server": 0.0}


def test_switched_turns_are_compared_with_the_same_turns_of_the_original() -> None:
    quick = replace(played("a", "b", "c", engine="surrogate"))
    quick = replace(quick, turns=tuple(replace(turn, latency_s=0.25 * turn.turn) for turn in quick.turns))
    ours, theirs = measured("soma", quick), measured("original", played("a", "b", "c"))
    assert switched_latency([ours], [theirs], warm=1) == 0.625  # of .5 and .75: turn 1 is no later one
    assert switched_latency([theirs], [theirs], warm=1) is None


def test_each_repeat_ranks_the_arms_by_its_own_later_turns() -> None:
    arms = {"a": {"later_latency_p50_by_repeat": [2.0, 1.0]}, "b": {"later_latency_p50_by_repeat": [1.0, 3.0]}}
    assert rankings(arms, [["a", "b"], ["b", "a"]]) == [
        {"played": ["a", "b"], "ranked": ["b", "a"]},
        {"played": ["b", "a"], "ranked": ["a", "b"]},
    ]


def test_percentiles_of_nothing_are_unknown() -> None:
    assert percentiles([]) == {"p50": None, "p90": None, "p99": None}
    assert percentiles([1.0, 2.0, 3.0])["p50"] == 2.0


@pytest.mark.parametrize("name", ["quick", "study"])
def test_the_results_that_are_told_are_those_of_the_committed_run(name: str) -> None:
    run = ROOT / "docs" / "results" / f"{name}.json"
    assert markdown(json.loads(run.read_text())) in (ROOT / "docs" / "results.md").read_text()


def test_a_document_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.md"
    document = "before\n<!-- study: end -->\n<!-- study: begin -->\n"
    path.write_text(document)
    with pytest.raises(ValueError, match="expected both"):
        replace_marked(path, "study", "made")
    assert path.read_text() == document
