"""`soma distill` as a user runs it: real original, real training, tiny random models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from support.guard import GUARD_S
from support.server import TINY

DIALOGUES = {
    "a": ["Say hello.", "And again?", "In French.", "Once more.", "Thanks."],
    "b": ["Count to three.", "Go on.", "Further.", "Stop.", "Why?"],
}


def test_an_adapter_of_many_sessions_is_made_and_a_session_can_start_from_it(
    tiny_models: Path, tmp_path: Path
) -> None:
    home, pair = tmp_path / "home", tmp_path / "pair"
    home.mkdir()
    (home / "models").symlink_to(tiny_models)
    dialogues = tmp_path / "dialogues.json"
    dialogues.write_text(json.dumps(DIALOGUES))

    def soma(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "soma_vllm.cli.main", *arguments],
            capture_output=True,
            text=True,
            timeout=GUARD_S,
            check=False,
            env={**os.environ, "SOMA_HOME": str(home)},
        )

    asked = ("--config", str(TINY), "--dialogues", str(dialogues))
    done = soma("distill", *asked, "--out", str(pair))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in pair.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "soma.json",
    }
    manifest = json.loads((pair / "soma.json").read_text())
    assert (manifest["tenant"], manifest["sessions"]) == ("*", 2)
    assert "Say hello" not in json.dumps(manifest) + done.stdout

    again = soma("distill", *asked, "--out", str(pair))
    assert again.returncode == 2
    assert "found files there" in again.stderr

    out = tmp_path / "out"
    used = soma("evaluate", *asked, "--init", str(pair), "--variant", "kd-init@full", "--out", str(out))
    assert used.returncode == 0, used.stdout + used.stderr
    found = json.loads((out / "evaluation.json").read_text())["variants"]["kd-init@full"]
    assert found["failed"] == []


def test_what_is_to_be_pooled_has_to_be_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "soma_vllm.cli.main",
            "distill",
            "--config",
            str(TINY),
            "--out",
            str(tmp_path / "o"),
        ],
        capture_output=True,
        text=True,
        timeout=GUARD_S,
        check=False,
    )
    assert done.returncode == 2
    assert "found neither of --dialogues and --tenant" in done.stderr
