"""Files from the wild: each is read, or told in one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from soma_vllm import documents
from soma_vllm.config import load_config
from soma_vllm.errors import ConfigError, DocumentError
from soma_vllm.tools.replay.dialogues import load_dialogues

DEEP = 100_000
LAUGHS = "a: &a [[x]]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise("abcdefghi")
)
"""A few lines whose aliases stand for millions of values."""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("warm_window: 3\nwarm_window: 9\n", "line 2: found warm_window twice in one section"),
        ("gate:\n  drift_window: 4\ngate:\n  audit_rate: 0.1\n", "line 3: found gate twice"),
        ("lora:\n  rank: 4\n  'rank': 8\n", "line 3: found rank twice"),
        ("policy: größe\n".encode("latin-1"), "found the byte 0xf6 in line 1, which is no UTF-8"),
        ("warm_window: 3\n".encode("utf-16"), "found UTF-16; expected UTF-8"),
        (bytes(range(256)), "expected text in UTF-8"),
        (b"a: \x00", "is not YAML"),
        ("gate: &g\n  drift_window: *g\n", "an alias that holds itself"),
        ("[" * 3000, "levels of nesting"),
        ("a: " + "[" * 200 + "]" * 200, "levels of nesting"),
        ('policy: "\\ud83d"\n', "line 1: found half a surrogate pair"),
        (LAUGHS, "values"),
    ],
)
def test_a_configuration_from_the_wild_is_told_in_one_mistake(
    content: str | bytes, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "wild.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match="1 mistake") as error:
        load_config(path)
    assert told in str(error.value)


def test_numbers_without_a_point_and_marks_of_byte_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / "marked.yaml"
    path.write_bytes("lora:\n  lr: 5e-3\n  weight_decay: 1E2\n".encode("utf-8-sig"))
    found = load_config(path, ["mining.lr=1e-4"])
    assert (found.lora.lr, found.lora.weight_decay, found.mining.lr) == (0.005, 100.0, 0.0001)


def test_a_number_is_taken_where_text_is_meant_and_a_truth_value_is_not(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("surrogate:\n  cpu_cores: 0\n  gpu: 1\n  extra_args: [--max-logprobs, 30]\n")
    found = load_config(path).surrogate
    assert (found.cpu_cores, found.gpu, found.extra_args) == ("0", "1", ("--max-logprobs", "30"))
    with pytest.raises(ConfigError, match="found True; expected a valid string"):
        load_config(path, ["surrogate.cpu_cores=true"])


def test_merge_keys_of_yaml_still_overrule(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text("original: &o\n  max_model_len: 64\nsurrogate:\n  <<: *o\n  max_model_len: 32\n")
    assert load_config(path).surrogate.max_model_len == 32


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[" * DEEP, "levels of nesting"),
        ('{"a": ' + "[" * DEEP, "levels of nesting"),
        ('{"a": ' + "[" * 300 + "]" * 300 + "}", "levels of nesting"),
        ('{"a": ["ä"]}'.encode("latin-1"), "which is no UTF-8"),
        ('{"a": ["x"]}'.encode("utf-16"), "found UTF-16"),
        ('{"broken": ["fine", "cut \\ud83d"], "sound": ["x"]}', "broken[2]: found half a surrogate pair"),
        ('{"a": [' + "9" * 5000 + "]}", "is not JSON"),
    ],
)
def test_dialogues_from_the_wild_are_told_in_one_mistake(
    content: str | bytes, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "wild.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match="1 mistake") as error:
        load_dialogues(path)
    assert told in str(error.value)


def test_dialogues_with_a_mark_of_byte_order_are_read(tmp_path: Path) -> None:
    path = tmp_path / "marked.json"
    path.write_bytes('{"a": ["Say a word."]}'.encode("utf-8-sig"))
    assert load_dialogues(path) == {"a": ("Say a word.",)}


def nested(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


def test_as_many_levels_as_allowed_are_read_and_one_more_is_not() -> None:
    allowed = json.dumps(nested(documents.MAX_DEPTH))
    assert documents.parse_json(allowed) == nested(documents.MAX_DEPTH)
    with pytest.raises(DocumentError, match="levels"):
        documents.parse_json(f"[{allowed}]")


def test_a_file_longer_than_allowed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text("[1, 2]")
    with pytest.raises(DocumentError, match="found more than 5 bytes"):
        documents.read_json(path, most=5)
    assert documents.read_json(path, most=6) == [1, 2]
