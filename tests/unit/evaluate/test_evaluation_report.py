"""The report: its shape, its means and differences, its table and its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from soma_vllm.config import Config
from soma_vllm.tools.command_line import write_json
from soma_vllm.tools.evaluate.evaluate_view import table
from soma_vllm.tools.evaluate.evaluation_report import draw, report, settings
from soma_vllm.tools.evaluate.harness import Choice, Numbers, SessionResult
from soma_vllm.tools.evaluate.variants import choose
from soma_vllm.types import Candidate

CONFIG = Config.model_validate({"original_model": "big", "surrogate_model": "small", "warm_window": 4})
VARIANTS = choose(["kd@anchored"], CONFIG)
ROW_KEYS = {
    "nll",
    "kl",
    "top1",
    "gap",
    "rouge_l",
    "prompt_tokens",
    "train_s",
    "train_flops",
    "ci95_nll",
    "sessions",
}


def numbers(nll: float, top1: float = 0.8, prompt: float = 100.0, kl: float | None = 0.2) -> Numbers:
    return Numbers(nll, top1, kl, None, None, prompt, tokens=50, turns=5)


def result(
    full: float, anchored: float, adapter: float, candidate: Candidate = Candidate.PLAIN
) -> SessionResult:
    found = {
        "plain@full": numbers(full, prompt=200.0),
        "plain@anchored": numbers(anchored),
        "kd@anchored": numbers(adapter, top1=0.9),
    }
    chosen = {Candidate.PLAIN: "plain@full", Candidate.ADAPTER: "kd@anchored"}.get(candidate)
    return SessionResult(
        found, Choice(candidate, chosen, "gap", {"candidates": {}}, None if chosen is None else found[chosen])
    )


RESULTS = {
    "a": result(1.0, 1.2, 1.0),
    "b": result(0.5, 0.8, 0.7, Candidate.ADAPTER),
    "c": result(0.9, 1.0, 1.1, Candidate.ORIGINAL),
}


MANY = {f"{name}{number}": found for name, found in RESULTS.items() for number in range(2)}
"""The same three, twice: enough for an interval."""


def made() -> dict[str, object]:
    facts = settings(CONFIG, {"a": ("q",) * 8}, ["d: too short"], "dialogues.json")
    return report(RESULTS, VARIANTS, facts | {"generated": False})


def test_a_variant_has_every_measure_its_interval_and_its_sessions() -> None:
    document = made()
    assert set(document) == {"settings", "variants", "chosen", "chosen_summary"}
    assert list(document["variants"]) == ["plain@full", "plain@anchored", "kd@anchored"]
    for row in document["variants"].values():
        assert row.keys() >= ROW_KEYS
        assert set(row["sessions"]) == {"a", "b", "c"}
        assert row["sessions"]["a"].keys() >= {
            "nll",
            "kl",
            "top1",
            "gap",
            "rouge_l",
            "prompt_tokens",
            "train_s",
        }


def test_differences_are_paired_with_the_plain_surrogate_of_the_same_prefix() -> None:
    rows = made()["variants"]
    assert (rows["plain@full"]["diff_nll"], rows["plain@full"]["ci95_nll"]) == (None, None)
    assert rows["plain@anchored"]["against"] == "plain@full"
    assert rows["plain@anchored"]["diff_nll"] == pytest.approx(0.2)  # .2, .3, .1
    assert rows["kd@anchored"]["against"] == "plain@anchored"
    assert rows["kd@anchored"]["diff_nll"] == pytest.approx(-0.2 / 3, abs=1e-6)  # -.2, -.1, +.1
    assert rows["kd@anchored"]["ci95_nll"] is None  # three sessions are too few
    low, high = report(MANY, VARIANTS, {})["variants"]["kd@anchored"]["ci95_nll"]
    assert -0.2 <= low < -0.2 / 3 < high <= 0.1
    assert rows["kd@anchored"]["share_of_full"] == {"top1": 1.125, "prompt_tokens": 0.5}


def test_the_summary_of_choices_leaves_out_what_the_original_keeps() -> None:
    document = made()
    assert document["chosen"]["c"] == {
        "candidate": "original",
        "variant": None,
        "reason": "gap",
        "held_out": {"candidates": {}},
        "later": None,
    }
    summary = document["chosen_summary"]
    assert summary["sessions"] == {"adapter": 1, "original": 1, "plain": 1}
    assert summary["nll"] == pytest.approx((1.0 + 0.7) / 2)
    assert summary["full_history"]["nll"] == pytest.approx((1.0 + 0.5) / 2)


def test_a_failed_training_is_named() -> None:
    broken = Numbers(1.2, 0.8, None, None, None, 100.0, tokens=50, turns=5, failed="a loss of nan")
    results = {"a": SessionResult({**RESULTS["a"].numbers, "kd@anchored": broken}, RESULTS["a"].choice)}
    row = report(results, VARIANTS, {})["variants"]["kd@anchored"]
    assert row["failed"] == ["a"]
    assert row["sessions"]["a"]["failed"] == "a loss of nan"
    assert row["ci95_nll"] is None


def test_the_report_is_json_and_gives_its_table_and_figures_back(tmp_path: Path) -> None:
    write_json(tmp_path / "new" / "evaluation.json", made(), allow_nan=False)
    document = json.loads((tmp_path / "new" / "evaluation.json").read_text())
    assert document == made() | {"settings": document["settings"]}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["evaluation.json"]
    console = Console(width=140, record=True)
    console.print(table(document))
    printed = console.export_text()
    assert "-0.067" in printed
    assert "chosen (1 adapter, 1 original, 1 plain)" in printed
    paths = draw(document, tmp_path)
    assert [path.name for path in paths] == ["nll.png", "top1.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
