"""Sessions that return, through a whole server whose engine has room for two adapters: whose words come."""

from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.server import Dialogue, Running

MARKERS = ("house", "music", "river")


def series(running: Running) -> str:
    return running.get("/metrics").text


def value(metrics: str, name: str) -> float:
    """A series, summed over labels."""
    return sum(float(x) for x in re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", metrics, re.MULTILINE))


@pytest.fixture(scope="module")
def dialogues(marker_server: Running) -> dict[str, Dialogue]:
    """Three sessions, each of which learned to say another word; the engine keeps two of them at a time."""
    taught = {}
    for marker in MARKERS:
        dialogue = taught[marker] = Dialogue(marker_server, f"swap-{marker}", **{"X-SOMA-Force": "adapter"})
        for number in range(1, 4):
            dialogue.say(f"question {number}, please say {marker}")
    for marker in MARKERS:
        marker_server.until(f"swap-{marker}", "SWITCHED")
    return taught


def adapter_folder(running: Running, marker: str) -> Path:
    """Where the session's adapter lies."""
    name = running.session(f"swap-{marker}")["adapter"]
    (manifest,) = (p for p in running.run_dir.rglob("soma.json") if f'"{name}"' in p.read_text())
    return manifest.parent


def test_sessions_that_come_back_hear_their_own_adapter_again(
    marker_server: Running, dialogues: dict[str, Dialogue]
) -> None:
    for _ in range(2):
        for marker, dialogue in dialogues.items():
            said = dialogue.say("and once more", max_tokens=32)
            assert dialogue.headers["X-SOMA-Engine"] == "surrogate", dialogue.headers["X-SOMA-Reason"]
            assert [word for word in MARKERS if word in said] == [marker]
    metrics = series(marker_server)
    assert value(metrics, "soma_adapter_evictions_total") >= 4
    assert 1 <= value(metrics, "soma_adapters_resident") <= 2
    # Each was proven to be served as it was trained.
    assert json.loads((adapter_folder(marker_server, MARKERS[0]) / "soma.json").read_text())["training"][
        "signature"
    ]
    assert value(metrics, "soma_adapter_rejections_total") == 0


def test_all_at_once_each_hears_its_own_or_the_original(
    marker_server: Running, dialogues: dict[str, Dialogue]
) -> None:
    with ThreadPoolExecutor(len(MARKERS)) as pool:
        for _ in range(3):
            said = list(pool.map(lambda d: d.say("and all together", max_tokens=32), dialogues.values()))
            for marker, text in zip(MARKERS, said, strict=True):
                assert [word for word in MARKERS if word in text] == [marker]
    assert value(series(marker_server), "soma_adapter_holds") == 0


def test_nothing_that_is_exposed_names_an_adapter(
    marker_server: Running, dialogues: dict[str, Dialogue]
) -> None:
    dialogues[MARKERS[0]].say("once more")
    metrics = series(marker_server)
    names = [marker_server.session(f"swap-{marker}")["adapter"] for marker in MARKERS]
    assert all(names)
    assert "vllm:num_requests_running" in metrics
    assert "lora_requests_info" not in metrics
    assert not any(name in metrics for name in names)
    assert 'soma_adapter_load_seconds_count{state="cold"}' in metrics


def test_a_session_whose_files_are_lost_is_answered_by_the_original_and_others_as_before(
    marker_server: Running, dialogues: dict[str, Dialogue]
) -> None:
    lost, *others = MARKERS
    dialogues[lost].say("once more")
    assert dialogues[lost].headers["X-SOMA-Engine"] == "surrogate"
    shutil.rmtree(adapter_folder(marker_server, lost))
    dialogues[lost].say("from memory", max_tokens=32)
    assert dialogues[lost].headers["X-SOMA-Engine"] == "surrogate", "it lies in the engine still"
    for marker in others:
        dialogues[marker].say("once more", max_tokens=32)
    said = dialogues[lost].say("and now?", max_tokens=32)
    assert dialogues[lost].headers["X-SOMA-Engine"] == "original"
    assert dialogues[lost].headers["X-SOMA-Reason"] == "surrogate failed: unavailable"
    marker_server.logged("the original answers instead of the surrogate")
    assert lost in said
    for marker in others:
        assert marker in dialogues[marker].say("still there?", max_tokens=32)
        assert dialogues[marker].headers["X-SOMA-Engine"] == "surrogate"
    assert marker_server.get("/health").status_code == 200


def test_the_first_turn_under_an_adapter_finds_the_history_in_the_cache(marker_server: Running) -> None:
    dialogue = Dialogue(marker_server, "cached", **{"X-SOMA-Force": "adapter"})
    for number in range(1, 4):
        dialogue.say(f"question {number}: {'this is a long question ' * 20} please say light")
    marker_server.until("cached", "SWITCHED")
    dialogue.say("and a short one?")
    assert dialogue.headers["X-SOMA-Engine"] == "surrogate"
    turn = marker_server.session("cached")["turns"][3]
    # Blocks of 128 tokens: all of the history but what shares a block with the query.
    assert turn["prompt_tokens"] > 384
    assert turn["cached_tokens"] >= (turn["prompt_tokens"] // 128 - 1) * 128
