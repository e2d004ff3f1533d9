"""Workloads: the shipped ones are right, parts never mix, and mistakes are told all at once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from study.checks import graded
from study.workloads import FROZEN, PARTS, Session, digest, freeze, frozen, load_workloads, thresholds
from workloads import generate

import soma_vllm
from soma_vllm.config import load_config
from soma_vllm.errors import ConfigError

ROOT = Path(soma_vllm.__file__).parent.parent
FOLDER = ROOT / "benchmarks" / "workloads"
PAIRS = {name: ROOT / "configs" / f"{name}.yaml" for name in ("cpu_demo", "cpu_weak")}


@pytest.fixture(scope="module")
def sessions() -> list[Session]:
    return load_workloads(FOLDER)


def test_the_shipped_workloads_are_what_their_generator_writes(tmp_path: Path) -> None:
    generate.main(tmp_path)
    written = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*.json")}
    assert written == {path.relative_to(FOLDER): path.read_text() for path in FOLDER.glob("*/*.json")}


def test_there_are_eight_workloads_of_twelve_sessions_of_ten_turns(sessions: list[Session]) -> None:
    counts = Counter(one.workload for one in sessions)
    assert len(counts) >= 8
    assert min(counts.values()) >= 12
    assert min(len(one.turns) for one in sessions) >= 10
    assert max(len(one.turns) for one in sessions) >= 13


def test_every_workload_has_sessions_in_every_part(sessions: list[Session]) -> None:
    found = Counter((one.workload, one.part) for one in sessions)
    assert {part for _, part in found} == set(PARTS)
    assert set(found.values()) == {generate.PER_PART}


def test_the_right_answers_pass_and_those_of_other_turns_mostly_do_not(sessions: list[Session]) -> None:
    first = {one.workload: one for one in sessions}.values()
    for one in first:
        answers = [answer for _, _, answer in generate.made(one.workload)[one.name]]
        assert graded(answers, one.checks) == [True] * len(one.turns), one.id
        assert graded(["I do not know."] * len(one.turns), one.checks) == [False] * len(one.turns)
        shifted = graded([*answers[1:], answers[0]], one.checks)
        assert sum(map(bool, shifted)) < len(one.turns) - 3, one.id


def test_most_questions_of_a_session_differ(sessions: list[Session]) -> None:
    for one in sessions:
        assert len(set(one.turns)) >= 0.8 * len(one.turns), one.id


def write(folder: Path, name: str, sessions: Any, checks: Any) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "sessions.json").write_text(json.dumps(sessions))
    (folder / name / "checks.json").write_text(json.dumps(checks))


def test_everything_wrong_with_all_folders_is_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "a", {"one": ["q", "r"]}, {"one": [{"kind": "poem"}], "two": []})
    write(tmp_path, "b", {"x": ["q", " "]}, {"x": [None, None]})
    write(tmp_path, "c", {"x": ["q", "r"]}, {"x": [{"kind": "equals"}, {"kind": "regex", "pattern": "("}]})
    (tmp_path / "d").mkdir()
    with pytest.raises(ConfigError) as caught:
        load_workloads(tmp_path)
    text = str(caught.value)
    for told in (
        "a: checks.json: one: found 1 checks; expected 2",
        "a: checks.json: two: found no such session",
        "b: sessions.json: x[2]: found an empty turn; expected text",
        "c: checks.json: x[1]: equals.expected: found",
        'c: checks.json: x[2]: regex: found {"kind": "regex", "pattern": "("}; expected pattern: a regular',
        "d: sessions.json: cannot be read",
    ):
        assert told in text, text


def test_a_folder_without_workloads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one folder"):
        load_workloads(tmp_path)
    with pytest.raises(ConfigError, match="found no folder"):
        load_workloads(tmp_path / "no")


def test_what_is_frozen_is_what_the_test_part_is_played_with(sessions: list[Session], tmp_path: Path) -> None:
    config = load_config(PAIRS["cpu_demo"])
    freeze(tmp_path, sessions, {"cpu_demo": config})
    assert frozen(tmp_path, sessions, "cpu_demo", config)["thresholds"]
    with pytest.raises(ConfigError, match=r"gate.accept_threshold: found 0.2; expected 0.12"):
        frozen(tmp_path, sessions, "cpu_demo", load_config(PAIRS["cpu_demo"], ["gate.accept_threshold=0.2"]))
    with pytest.raises(ConfigError, match="found none of other"):
        frozen(tmp_path, sessions, "other", config)


def test_another_test_part_is_refused_and_another_tuning_part_is_not(
    sessions: list[Session], tmp_path: Path
) -> None:
    config = load_config(PAIRS["cpu_demo"])
    freeze(tmp_path, sessions, {"cpu_demo": config})
    tuned = [one for one in sessions if one.part != "tuning"]
    frozen(tmp_path, tuned, "cpu_demo", config)
    test = next(one for one in sessions if one.part == "test")
    with pytest.raises(ConfigError, match="test_part: found"):
        frozen(tmp_path, [one for one in sessions if one is not test], "cpu_demo", config)
    changed = Session(test.workload, test.name, test.turns, (None, *test.checks[1:]))
    assert digest([changed]) != digest([test])


def test_the_committed_test_part_and_thresholds_are_the_frozen_ones(sessions: list[Session]) -> None:
    """If not, a threshold changed: `benchmarks/throughput.py --freeze` freezes anew, before a test run."""
    document = json.loads((FOLDER / FROZEN).read_text())
    for pair, path in PAIRS.items():
        frozen(FOLDER, sessions, pair, load_config(path))
        assert document["thresholds"][pair].keys() == thresholds(load_config(path)).keys()
