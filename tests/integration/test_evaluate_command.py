"""`soma evaluate` as a user runs it: real original, real training, tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.guard import GUARD_S
from support.marker_original import MarkerOriginal
from support.server import TINY

DIALOGUES = {
    "a": ["Say hello.", "And again?", "In French.", "Once more.", "Thanks."],
    "b": ["Count to three.", "Go on.", "Further.", "Stop.", "Why?"],
    "short": ["Hello."],
}
ARGUMENTS = ("--variant", "kd@anchored", "--variant", "soma@full", "--set", "prefix.mode=anchored")
MEASURED = ["plain@full", "plain@anchored", "soma@full", "kd@anchored"]

Evaluate = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def evaluate(tiny_models: Path, tmp_path: Path) -> Evaluate:
    """Runs the command with a home of its own, in which no trajectory is remembered yet."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(tiny_models)
    (tmp_path / "dialogues.json").write_text(json.dumps(DIALOGUES))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "soma_vllm.cli.main", "evaluate", "--config", str(TINY)]
        command += ["--dialogues", str(tmp_path / "dialogues.json"), "--out", str(tmp_path / "out")]
        environment = {**os.environ, "SOMA_HOME": str(home)}
        return subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
            env=environment,
        )

    return run


def report(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    return found


def test_variants_are_measured_and_the_second_run_starts_no_original(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    done = evaluate(*ARGUMENTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "short: found 1 turns; expected at least 4" in done.stdout
    first = report(tmp_path)
    assert list(first["variants"]) == MEASURED
    for row in first["variants"].values():
        assert set(row["sessions"]) == {"a", "b"}
        assert all(row[name] is not None for name in ("nll", "kl", "top1", "gap", "rouge_l"))
    adapted, plain = (first["variants"][name] for name in ("kd@anchored", "plain@anchored"))
    assert adapted["nll"] != plain["nll"]
    assert min(adapted["train_s"], adapted["train_flops"]) > 0 == plain["train_s"]
    assert {choice["candidate"] for choice in first["chosen"].values()} <= {"plain", "adapter", "original"}
    assert first["settings"]["dialogues"]["turns"] == {"a": 5, "b": 5}
    assert "Say hello" not in json.dumps(first) + done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "nll.png",
        "top1.png",
    ]

    # An original that has a millisecond to start cannot have answered anything.
    again = evaluate(*ARGUMENTS, "--set", "original.start_timeout_s=0.001")
    assert again.returncode == 0, again.stdout + again.stderr
    for name in MEASURED:
        assert report(tmp_path)["variants"][name]["nll"] == first["variants"][name]["nll"]


def test_a_black_box_original_has_no_kl_and_a_training_that_fails_counts_as_plain(
    evaluate: Evaluate, tmp_path: Path
) -> None:
    with MarkerOriginal() as original:
        settings = [f"original.url={original.url}", "original.name=markers", "lora.lr=1.0e+30"]
        arguments = [part for setting in settings for part in ("--set", setting)]
        done = evaluate(*arguments, "--variant", "kd@full", "--no-generate")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = report(tmp_path)["variants"]
    assert [rows["plain@full"][name] for name in ("kl", "gap", "rouge_l")] == [None] * 3
    assert rows["kd@full"]["failed"] == ["a", "b"]
    assert rows["kd@full"]["nll"] == rows["plain@full"]["nll"]
    assert "(2 failed)" in done.stdout


def test_wrong_input_is_told_at_once_before_anything_starts(evaluate: Evaluate, tmp_path: Path) -> None:
    done = evaluate("--variant", "best@full", "--only", "nobody", "--init", str(tmp_path / "none"))
    assert done.returncode == 2
    for problem in ("--variant best@full: expected METHOD@PREFIX", "--only nobody", "no adapter_config.json"):
        assert problem in done.stderr
    assert evaluate("--only", "short").returncode == 2
    assert not (tmp_path / "out").exists()


def test_an_original_that_does_not_answer_is_told(evaluate: Evaluate) -> None:
    done = evaluate("--set", "original.url=http://127.0.0.1:9/v1", "--set", "original.name=nobody")
    assert done.returncode == 1
    assert "soma evaluate: the original cannot be reached" in done.stderr
