"""LLMLingua-2 and RouteLLM themselves, on tiny random models of the right form, and the history baselines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.server import TINY, Dialogue, Running
from typer.testing import CliRunner

from soma_vllm.cli.main import app

REASON = re.compile(r"win rate ([0-9.]+) (not below|below) ([0-9.]+)")


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
    assert "training_submitted" in events
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


def test_routellm_sends_a_query_where_its_score_says(tiny_server: Running) -> None:
    for number, query in enumerate(("Hello", "Explain how tides work in detail", "Sort a list", "7 times 6")):
        dialogue = Dialogue(tiny_server, f"routed-{number}", model="soma:routellm")
        dialogue.say(query, max_tokens=4)
        match = REASON.fullmatch(dialogue.headers["X-SOMA-Reason"])
        assert match is not None
        score, threshold = float(match[1]), float(match[3])
        assert 0.0 < score < 1.0
        to_original = dialogue.headers["X-SOMA-Engine"] == "original"
        assert to_original == (match[2] == "not below")
        assert to_original == (score >= threshold)


def test_queries_that_were_logged_calibrate_the_router_for_a_share_of_them(
    tiny_server: Running, tiny_router: Path
) -> None:
    dialogue = Dialogue(tiny_server, "logged", model="soma:original")
    for query in ("Hello", "Explain how tides work", "Sort a list of numbers", "What is 7 times 6?"):
        dialogue.say(query, max_tokens=2)
    url = f"sqlite+aiosqlite:///{tiny_server.run_dir}/sessions.db"
    options = ["--set", f"baselines.routellm.checkpoint={tiny_router}", "--share", "0.5", "--storage", url]
    found = CliRunner().invoke(app, ["calibrate-router", "--config", str(TINY), *options])
    assert found.exit_code == 0, found.output
    share = re.search(r"share +([0-9.]+) of them for the original, 0\.5 wanted", found.output)
    threshold = re.search(r"baselines\.routellm\.threshold: ([0-9.]+)", found.output)
    assert share is not None
    assert threshold is not None
    assert 0.25 <= float(share[1]) <= 0.75
    assert 0.0 < float(threshold[1]) < 1.0


@pytest.mark.parametrize("source", [[], ["--dialogues", "a.json", "--storage", "sqlite+aiosqlite:///b.db"]])
def test_a_router_is_calibrated_on_one_source_of_queries(source: list[str]) -> None:
    found = CliRunner().invoke(app, ["calibrate-router", "--config", str(TINY), *source])
    assert found.exit_code == 2
    assert "of --dialogues and --storage; expected one" in found.output
