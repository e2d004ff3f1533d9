"""The commands of docs/load.md as they stand there, against a real server; each where its tool is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from running import ROOT, Running  # type: ignore[import-not-found]

from soma_vllm.models.home import models_dir, soma_home

TOOLS = soma_home() / "tools"
TURNS, REQUESTS = 4, 8


def command(tool: str) -> str:
    """The block of docs/load.md that runs a tool."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "load.md").read_text(), re.DOTALL)
    (found,) = [block for block in blocks if f"bin/{tool}" in block]
    return str(found)


def load(tool: str, running: Running, out: Path) -> None:
    """Run it with a small workload; skipped where it is not installed."""
    if not (TOOLS / tool / "bin" / tool).exists():
        pytest.skip(f"{tool} is not installed in {TOOLS / tool}; make load-tools does it")
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        **{"SOMA_URL": running.root, "TOOLS": str(TOOLS), "OUT": str(out)},
        **{"TOKENIZER": str(models_dir() / "tiny-surrogate"), "HF_HUB_OFFLINE": "1"},
        **{"TURNS": str(TURNS), "REQUESTS": str(REQUESTS), "THINK_S": "1", "RATE": "4"},
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command(tool)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]


def sessions(running: Running, key: str) -> list[dict[str, Any]]:
    """What the server has of a tool's sessions."""
    headers = {"Authorization": f"Bearer {key}"}
    answer = httpx.get(f"{running.root}/soma/sessions", headers=headers, timeout=30)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def test_guidellm_plays_dialogues_that_are_told_by_their_transcript(
    tiny_server: Running, tmp_path: Path
) -> None:
    load("guidellm", tiny_server, tmp_path)
    (benchmark,) = json.loads((tmp_path / "guidellm.json").read_text())["benchmarks"]
    assert benchmark["metrics"]["request_totals"]["successful"] == REQUESTS
    assert benchmark["metrics"]["request_totals"]["errored"] == 0
    found = sessions(tiny_server, "guidellm")
    assert sum(session["turns"] for session in found) >= REQUESTS
    assert max(session["turns"] for session in found) == TURNS


def test_aiperf_plays_dialogues_that_it_names(tiny_server: Running, tmp_path: Path) -> None:
    load("aiperf", tiny_server, tmp_path)
    report = json.loads((tmp_path / "aiperf" / "profile_export_aiperf.json").read_text())
    assert report["request_count"]["avg"] == REQUESTS
    found = sessions(tiny_server, "aiperf")
    assert sorted(session["turns"] for session in found) == [TURNS] * (REQUESTS // TURNS)
