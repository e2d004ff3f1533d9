"""What other load generators report, and how ours is held against it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from load_agreement import rows
from study.load_tools import LoadFailed, Seen, command, seen

OURS = Seen(0.5, 0.1, 2.0, 100.0, 16.0)


def guidellm(folder: Path, answered: int) -> None:
    values = {
        "time_to_first_token_ms": 500.0,
        "inter_token_latency_ms": 100.0,
        "request_latency": 2.0,
        "prompt_token_count": 100.0,
        "output_token_count": 16.0,
    }
    metrics = {name: {"successful": {"median": value}} for name, value in values.items()}
    metrics["request_totals"] = {"successful": answered, "errored": 0}
    (folder / "guidellm.json").write_text(json.dumps({"benchmarks": [{"metrics": metrics}]}))


def aiperf(folder: Path, answered: int) -> None:
    values = {
        "time_to_first_token": 500.0,
        "inter_token_latency": 100.0,
        "request_latency": 2000.0,
        "input_sequence_length": 100.0,
        "output_sequence_length": 16.0,
    }
    report = {name: {"p50": value} for name, value in values.items()} | {"request_count": {"avg": answered}}
    (folder / "aiperf").mkdir()
    (folder / "aiperf" / "profile_export_aiperf.json").write_text(json.dumps(report))


@pytest.mark.parametrize(("tool", "write"), [("guidellm", guidellm), ("aiperf", aiperf)])
def test_each_tools_units_are_brought_to_seconds(tool: str, write: object, tmp_path: Path) -> None:
    write(tmp_path, 8)
    assert seen(tool, tmp_path, 8) == OURS
    with pytest.raises(LoadFailed, match="found 8 answers and 0 errors; expected 9 and none"):
        seen(tool, tmp_path, 9)


def test_each_tool_has_its_command_in_the_document() -> None:
    for tool in ("guidellm", "aiperf"):
        assert f"{tool}/bin/{tool}" in command(tool)


def test_ratios_are_taken_round_by_round() -> None:
    slow, slower = (replace(OURS, latency_s=factor * OURS.latency_s) for factor in (2.0, 4.0))
    rounds = [
        {"ours": OURS, "guidellm": OURS, "aiperf": slow},
        {"ours": slow, "guidellm": slow, "aiperf": slower},
        {"ours": slow, "guidellm": OURS, "aiperf": slow},
    ]
    cells = dict(rows(rounds))["turn, s"]
    assert cells == ["4.000", "2.000", "4.000", "1.00 [1.00, 2.00]", "0.50 [0.50, 1.00]"]
