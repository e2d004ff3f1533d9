"""Dialogue files and the choice of what to play: every mistake at once, with found and expected."""

import json
from pathlib import Path

import pytest

from soma_vllm.config import Config
from soma_vllm.errors import ConfigError
from soma_vllm.tools.replay.dialogues import load_dialogues, make_script

SHIPPED = Path(__file__).parents[3] / "dialogues" / "demo.json"
STUDY = SHIPPED.with_name("study.json")
FORCING = {"adaptation": {"allow_force_header": True}, "warm_window": 3, "max_new_tokens": 48}


def written(tmp_path: Path, document: object) -> Path:
    path = tmp_path / "dialogues.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", [SHIPPED, STUDY], ids=lambda path: path.stem)
def test_the_shipped_dialogues_are_eight_or_more_of_eight_to_twelve_turns(path: Path) -> None:
    dialogues = load_dialogues(path)
    assert len(dialogues) >= 8
    assert {name: len(turns) for name, turns in dialogues.items() if not 8 <= len(turns) <= 12} == {}


def test_the_shipped_first_turns_are_short_enough_for_a_slow_machine() -> None:
    dialogues = load_dialogues(SHIPPED)
    assert {
        name: len(turns[0].split()) for name, turns in dialogues.items() if len(turns[0].split()) > 120
    } == {}
    later = [turn for turns in dialogues.values() for turn in turns[1:]]
    assert max(len(turn.split()) for turn in later) <= 25


def test_the_shipped_topic_change_stays_on_its_topic_for_six_turns() -> None:
    turns = load_dialogues(SHIPPED)["topic-change"]
    assert ["Ticket:" in turn for turn in turns] == [True] * 6 + [False] * 5


def test_the_study_asks_short_questions_and_pastes_facts_twice_in_the_middle() -> None:
    later = [(n, turn) for turns in load_dialogues(STUDY).values() for n, turn in enumerate(turns[1:], 2)]
    pasted = [n for n, turn in later if len(turn.split()) > 25]
    assert len(pasted) == 2
    assert all(4 <= n <= 6 for n in pasted)


def test_no_two_shipped_dialogues_share_a_name() -> None:
    assert set(load_dialogues(SHIPPED)) & set(load_dialogues(STUDY)) == set()


@pytest.mark.parametrize("path", [SHIPPED, STUDY], ids=lambda path: path.stem)
def test_every_shipped_dialogue_is_described(path: Path) -> None:
    text = (path.parent / "README.md").read_text(encoding="utf-8")
    assert [name for name in load_dialogues(path) if f"| `{name}` |" not in text] == []


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    path = written(tmp_path, {"a b": ["x"], "empty": [], "text": "hello", "mixed": ["fine", 7, "  "]})
    with pytest.raises(ConfigError) as caught:
        load_dialogues(path)
    assert caught.value.problems == (
        "id 'a b': expected 1 to 64 letters, digits, dots, dashes or underscores",
        "empty: found an empty list; expected a list of user turns",
        "text: found a str; expected a list of user turns",
        "mixed[2]: found a int; expected a string",
        "mixed[3]: found an empty turn; expected text",
    )


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([["x"]], "found a list; expected {"),
        ({}, "found an empty object; expected {"),
        ("{", "is not JSON: "),
        ('{"a": ["x"], "a": ["y"]}', "a: found twice; expected each id once"),
    ],
)
def test_a_file_of_another_shape_is_refused(tmp_path: Path, document: object, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_dialogues(written(tmp_path, document))
    assert caught.value.problems[0].startswith(problem)


def test_a_missing_file_is_named_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_dialogues(tmp_path / "none.json")


def test_only_and_limit_turns_choose_what_is_played() -> None:
    config = Config.model_validate(FORCING)
    dialogues = {"a": ("1", "2", "3"), "b": ("1",)}
    script = make_script("cli", dialogues, config, only=["a"], limit_turns=2, force_adapter=["a"])
    assert script.dialogues == {"a": ("1", "2")}
    assert script.forced == {"a"}
    assert (script.warm_window, script.max_tokens) == (3, 48)


def test_forcing_needs_a_server_that_allows_it_and_a_dialogue_that_is_played() -> None:
    with pytest.raises(ConfigError) as caught:
        make_script("cli", {"a": ("1",), "b": ("1",)}, Config(), only=["a", "z"], force_adapter=["b"])
    assert caught.value.problems == (
        "--only z: no such dialogue; expected one of a, b",
        "--force-adapter b: not among the dialogues to play; expected one of a",
        "--force-adapter: found adaptation.allow_force_header: false; expected true",
    )
