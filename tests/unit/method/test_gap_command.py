"""`soma gap` on files as they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from soma_vllm.cli.main import app
from soma_vllm.config import Config
from soma_vllm.method.gap.gap_judge import Pair
from soma_vllm.tools import gap_command
from soma_vllm.types import Gap


class EqualJudge:
    def gaps(self, pairs: list[Pair]) -> list[Gap]:
        return [Gap(0.0) if a == b else Gap(0.5, (f"{a} / {b}",)) for a, b in pairs]


@pytest.fixture(autouse=True)
def _judge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gap_command, "open_gap_judge", lambda config: EqualJudge())


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["gap", *arguments])
    return result.exit_code, result.output


def test_every_pair_is_told_with_its_gap_its_verdict_and_its_reasons(tmp_path: Path) -> None:
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out" / "gaps.json"
    pairs.write_text('{"a": "4", "b": "4", "right": true}\n\n{"a": "4", "b": "5"}\n')
    code, said = run(str(pairs), "--json", str(out))
    assert code == 0
    assert "1 of 2 pairs pass" in said
    threshold = Config().gate.accept_threshold
    assert json.loads(out.read_text())["pairs"] == [
        {"gap": 0.0, "threshold": threshold, "passes": True, "why": []},
        {"gap": 0.5, "threshold": threshold, "passes": False, "why": ["4 / 5"]},
    ]


def test_the_threshold_is_the_configurations(tmp_path: Path) -> None:
    pairs, config = tmp_path / "pairs.jsonl", tmp_path / "c.yaml"
    pairs.write_text('{"a": "4", "b": "5"}\n')
    config.write_text("gate: {accept_threshold: 0.6}\n")
    assert "1 of 1 pairs pass at 0.6" in run(str(pairs), "--config", str(config))[1]
    assert "0 of 1" in run(str(pairs), "--config", str(config), "--set", "gate.accept_threshold=0.1")[1]


def test_all_mistakes_of_a_file_are_told_at_once(tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"a": "4"}\nnot json\n[1]\n{"a": 4, "b": "x"}\n')
    code, said = run(str(pairs))
    assert code == 2
    assert [line.split("pairs.jsonl, ")[1] for line in said.splitlines()] == [
        "line 1: b: found nothing; expected a text",
        "line 2: found no JSON; expected an object with the texts a and b",
        "line 3: found a list; expected an object with the texts a and b",
        "line 4: a: found int; expected a text",
    ]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe"])
def test_a_file_without_pairs_is_refused(tmp_path: Path, content: bytes) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_bytes(content)
    assert run(str(pairs))[0] == 2
    assert run(str(tmp_path / "none"))[0] == 2
