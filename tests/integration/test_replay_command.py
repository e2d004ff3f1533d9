"""`soma replay` against a real server: the log, the figure, and what it expects of a run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.guard import GUARD_S
from support.server import ROOT, TINY, Running

TURN_KEYS = {
    "turn",
    "query",
    "answer",
    "engine",
    "adapter",
    "phase",
    "reason",
    "gap",
    "prompt_tokens",
    "cached_tokens",
    "completion_tokens",
    "ttft_s",
    "latency_s",
}


def replay(running: Running, out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "soma_vllm.cli.main", "replay", "--config", str(TINY)]
    command += ["--dialogues", str(ROOT / "dialogues" / "demo.json"), "--out", str(out)]
    command += ["--url", f"{running.root}/v1", "--limit-turns", "5", "--await-verdicts"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=GUARD_S, check=False)


def test_a_replay_writes_its_log_and_its_figure(tiny_server: Running, tmp_path: Path) -> None:
    arguments = ["--only", "house-style", "--only", "sensor-json", "--force-adapter", "house-style"]
    done = replay(tiny_server, tmp_path, *arguments, "--expect", "switch", "--expect", "adapter")
    assert done.returncode == 0, done.stdout + done.stderr
    log = json.loads((tmp_path / "soma_log.json").read_text())
    assert set(log["sessions"]) == {"house-style", "sensor-json"}
    session = log["sessions"]["house-style"]
    assert session["turns"][0].keys() >= TURN_KEYS
    assert [turn["engine"] for turn in session["turns"]] == ["original"] * 3 + ["surrogate"] * 2
    assert session["turns"][-1]["adapter"]
    assert session["turns"][-1]["prompt_tokens"] > 0
    assert {"mining_s", "finetune_s", "steps", "hardness", "acceptance"} <= session["training"].keys()
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_misses_what_was_expected_of_it_fails(tiny_server: Running, tmp_path: Path) -> None:
    done = replay(tiny_server, tmp_path, "--only", "sensor-json", "--expect", "rollback")
    assert done.returncode == 1
    assert "expected rollback" in done.stdout + done.stderr
