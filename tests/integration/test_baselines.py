"""LLMLingua-2 and RouteLLM themselves, on tiny random models of the right form, and the history baselines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from running import ROOT, TINY, Dialogue, Running  # type: ignore[import-not-found]
from typer.testing import CliRunner

from soma_vllm.cli.main import app

THRESHOLD = re.compile(r"baselines\.routellm\.threshold: ([0-9.]+)")


def calibrated(router: Path, share: float, *source: str) -> tuple[float, str]:
    """The threshold that the command prints, and all it says."""
    settings = ["--set", f"baselines.routellm.checkpoint={router}", "--share", str(share)]
    found = CliRunner().invoke(app, ["calibrate-router", "--config", str(TINY), *settings, *source])
    assert found.exit_code == 0, found.output
    match = THRESHOLD.search(found.output)
    assert match is not None, found.output
    return float(match[1]), found.output


def test_history_prefix_moves_to_the_plain_surrogate_after_the_warm_start(tiny_server: Running) -> None:
    dialogue = Dialogue(tiny_server, "prefix", model="soma:history_prefix")
    engines = []
    for number in range(1, 6):
        assert dialogue.say(f"question {number}")
        engines.append(dialogue.headers["X-SOMA-Engine"])
    assert engines == ["original"] * 3 + ["surrogate"] * 2
    assert {event["kind"] for event in tiny_server.session("prefix")["events"]} == {"turn"}


def test_history_ft_serves_with_an_adapter_that_nobody_judged(tiny_server: Running) -> None:
    dialogue = Dialogue(tiny_server, "fine-tuned", model="soma:history_ft")
    for number in range(1, 4):
        dialogue.say(f"question {number}")
    found = tiny_server.until("fine-tuned", "SWITCHED")
    assert found["policy"] == "history_ft"
    events = {event["kind"]: event["data"] for event in found["events"]}
    assert "judged" not in events
    assert events["training_submitted"]["turns"] == [1, 2, 3]
    assert events["trained"]["hardness"] == {}
    assert events["trained"]["plain"] is None
    assert dialogue.say("question 4")
    assert dialogue.headers["X-SOMA-Adapter"] == found["adapter"]
    assert tiny_server.session("fine-tuned")["turns"][-1]["engine"] == "surrogate"


def test_llmlingua2_compresses_what_the_original_is_shown(tiny_server: Running) -> None:
    dialogue = Dialogue(tiny_server, "compressed", model="soma:llmlingua2")
    whole = Dialogue(tiny_server, "whole-history", model="soma:original")
    for query in ("Edit this sentence: the users utilize two different forms of it.", "And make it shorter."):
        dialogue.say(query)
        whole.say(query)
    assert dialogue.headers["X-SOMA-Engine"] == "original"
    assert dialogue.headers["X-SOMA-Reason"].startswith("compressed to 0.")
    prompts = [tiny_server.session(name)["turns"] for name in ("compressed", "whole-history")]
    compressed, uncompressed = (turns[1]["prompt_tokens"] for turns in prompts)
    assert compressed < uncompressed


def test_routellm_splits_queries_between_the_engines_at_the_calibrated_threshold(
    tiny_server: Running, tiny_router: Path
) -> None:
    threshold, said = calibrated(tiny_router, 0.5, "--dialogues", str(ROOT / "dialogues" / "demo.json"))
    assert "share      0.5" in said
    assert f"{threshold:g}"
    engines = set()
    for number, query in enumerate(("Hello", "Explain how tides work in detail", "Sort a list", "7 times 6")):
        dialogue = Dialogue(tiny_server, f"routed-{number}", model="soma:routellm")
        dialogue.say(query, max_tokens=4)
        reason = dialogue.headers["X-SOMA-Reason"]
        score, limit = (float(n) for n in re.findall(r"[01]\.\d+", reason))
        assert dialogue.headers["X-SOMA-Engine"] == ("original" if "not below" in reason else "surrogate")
        assert ("not below" in reason) == (score >= limit)
        engines.add(dialogue.headers["X-SOMA-Engine"])
    assert 0.0 < score < 1.0


def test_queries_that_were_logged_calibrate_the_router(tiny_server: Running, tiny_router: Path) -> None:
    Dialogue(tiny_server, "logged").say("a question for the log")
    url = f"sqlite+aiosqlite:///{tiny_server.run_dir}/sessions.db"
    threshold, _ = calibrated(tiny_router, 1.0, "--storage", url)
    assert 0.0 < threshold < 1.0


@pytest.mark.parametrize("source", [[], ["--dialogues", "a.json", "--storage", "sqlite+aiosqlite:///b.db"]])
def test_a_router_is_calibrated_on_one_source_of_queries(source: list[str]) -> None:
    found = CliRunner().invoke(app, ["calibrate-router", "--config", str(TINY), *source])
    assert found.exit_code == 2
    assert "of --dialogues and --storage; expected one" in found.output
