"""The commands of docs/load.md as they stand there, against a real server; each where its tool is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from study.load_tools import TOOLS, Seen, Workload, installed, run_tool, seen
from support.guard import GUARD_S
from support.server import Running

from soma_vllm.models.home import models_dir

TURNS, REQUESTS = 4, 8
LOAD = Workload("soma", TURNS, REQUESTS, 1, {"RATE": "4"})


def load(tool: str, running: Running, out: Path) -> Seen:
    """Run it with a small workload; skipped where it is not installed."""
    if not installed(tool):
        pytest.skip(f"{tool} is not installed in {TOOLS / tool}; make load-tools does it")
    run_tool(tool, running.root, models_dir() / "tiny-surrogate", out, LOAD, limit_s=GUARD_S)
    return seen(tool, out, REQUESTS)


def sessions(running: Running, key: str) -> list[dict[str, Any]]:
    """What the server has of a tool's sessions."""
    answer = running.get("/soma/sessions", key)
    answer.raise_for_status()
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def test_guidellm_plays_dialogues_that_are_told_by_their_transcript(
    tiny_server: Running, tmp_path: Path
) -> None:
    found = load("guidellm", tiny_server, tmp_path)
    assert found.completion_tokens == 16
    played = sessions(tiny_server, "guidellm")
    assert sum(session["turns"] for session in played) >= REQUESTS
    assert max(session["turns"] for session in played) == TURNS


def test_aiperf_plays_dialogues_that_it_names(tiny_server: Running, tmp_path: Path) -> None:
    found = load("aiperf", tiny_server, tmp_path)
    assert 0 < found.ttft_s < found.latency_s
    played = sessions(tiny_server, "aiperf")
    assert sorted(session["turns"] for session in played) == [TURNS] * (REQUESTS // TURNS)
