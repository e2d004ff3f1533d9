"""`benchmarks/throughput.py` as a whole: three arms on the shared server, and a plain vLLM beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from study.plan import order
from support.guard import GUARD_S
from support.server import ROOT, TINY, Running

ARMS = ("original", "surrogate", "soma")
REPEATS, SESSIONS, TURNS, SEED = 2, 2, 5, 3
KEYS = {
    "later_turn_latency_p50",
    "later_turn_latency_p99",
    "ttft_p50",
    "turns_per_s",
    "fidelity",
    "share_surrogate",
    "net_cost",
}


def study(running: Running, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "--config", str(TINY)]
    command += ["--url", f"{running.root}/v1", "--quick", "--seed", str(SEED), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * GUARD_S, check=False)


@pytest.fixture(scope="module")
def run(tiny_server: Running, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole study, once: its folder and its document."""
    out = tmp_path_factory.mktemp("study")
    sizes = ["--repeats", str(REPEATS), "--sessions", str(SESSIONS), "--limit-turns", str(TURNS)]
    times = [
        "--arrival",
        "0.2",
        "--think",
        "0.05",
        "--max-tokens",
        "6",
        "--overhead-rounds",
        "2",
        "--seconds",
        "cpu",
    ]
    done = study(tiny_server, *sizes, *times, "--json", str(out / "study.json"), "--out", str(out))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return out, json.loads((out / "study.json").read_text())


def test_a_study_reports_every_arm_and_what_they_come_to(run: tuple[Path, dict[str, Any]]) -> None:
    out, document = run
    assert set(document["arms"]) == set(ARMS)
    for arm in document["arms"].values():
        assert arm.keys() >= KEYS
        assert arm["ttft_p50"] > 0
        assert arm["net_cost"] > 0
        assert [row["turn"] for row in arm["by_turn"]] == list(range(1, TURNS + 1))
    ratios = document["ratios"]
    assert ratios.keys() >= {"later_latency_soma_over_original", "dispatch_overhead_ms", "break_even_turn"}
    assert ratios["later_latency_soma_over_original"] > 0
    for name in ("whole_session_time_soma_over_original", "net_cost_soma_over_original"):
        assert ratios[name] > 0
        low, high = document["intervals"][name]
        assert 0 < low <= high
    assert ratios["task_accuracy_soma_over_original"] is None  # these dialogues have no truth
    assert isinstance(ratios["dispatch_overhead_ms"], float)
    for name in ("latency_by_turn", "cost_by_length", "fidelity_and_cost"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_planned_turn_was_completed(run: tuple[Path, dict[str, Any]]) -> None:
    _, document = run
    for block in document["blocks"]:
        assert [len(session["turns"]) for session in block["sessions"]] == [TURNS] * SESSIONS
        assert all(turn["completion_tokens"] > 0 for session in block["sessions"] for turn in session["turns"])
    assert len(document["blocks"]) == REPEATS * len(ARMS)


def test_arms_are_played_in_the_order_that_their_seed_draws(run: tuple[Path, dict[str, Any]]) -> None:
    _, document = run
    played = [block["arm"] for block in document["blocks"]]
    assert played == [arm for arms in order(ARMS, REPEATS, SEED) for arm in arms]
    assert any(order(ARMS, REPEATS, seed) != order(ARMS, REPEATS, SEED) for seed in range(10))


def test_each_arm_is_answered_by_whom_its_policy_says(run: tuple[Path, dict[str, Any]]) -> None:
    arms = run[1]["arms"]
    assert arms["original"]["share_surrogate"] == 0.0
    assert arms["original"]["fidelity"] == 1.0
    assert arms["surrogate"]["share_surrogate"] == 1.0
    warm_window = run[1]["settings"]["warm_window"]
    assert [row["share_surrogate"] for row in arms["soma"]["by_turn"][:warm_window]] == [0.0] * warm_window
    # Whether it switches before the last turn is a matter of milliseconds; that it was judged is not.
    assert arms["soma"]["events"]["judged"] == REPEATS * SESSIONS
    assert "judged" not in arms["original"]["events"]


def test_what_an_engine_did_falls_to_the_arm_that_asked_it(run: tuple[Path, dict[str, Any]]) -> None:
    for block in run[1]["blocks"]:
        engines = block["reading"]["engines"]
        turns = [turn for session in block["sessions"] for turn in session["turns"]]
        for name in ("original", "surrogate"):
            said = sum(turn["completion_tokens"] for turn in turns if turn["engine"] == name)
            assert engines[name]["generated"] >= said
            if said:
                assert block["reading"]["cpu_s"][name] > 0
                assert engines[name]["decode_s"] > 0


def test_a_report_holds_nothing_of_what_was_said(run: tuple[Path, dict[str, Any]]) -> None:
    said = json.loads((ROOT / "dialogues" / "demo.json").read_text())
    text = (run[0] / "study.json").read_text()
    long = [turn for turns in said.values() for turn in turns if len(turn) > 24]
    assert long
    assert not any(turn[:40] in text for turn in long)


def test_a_report_is_printed_again_without_a_server(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "throughput.py"),
        "--report",
        str(run[0] / "study.json"),
    ]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "net cost of a session" in done.stdout
    assert (tmp_path / "cost_by_length.png").exists()


def test_a_study_with_an_arm_that_is_not_set_up_fails_before_it_measures(tiny_server: Running) -> None:
    done = study(tiny_server, "--arms", "original,nobody", "--limit-turns", str(TURNS))
    assert done.returncode == 1
    assert "warm-up of nobody" in done.stderr
