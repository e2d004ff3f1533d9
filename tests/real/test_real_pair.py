"""The main job on the embedded pair: real answers, a real adapter, real engines. Minutes, not seconds."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from support.server import ROOT, Dialogue, Running, serving

from soma_vllm.models.fetch import fetch

DIALOGUES = json.loads((ROOT / "dialogues" / "demo.json").read_text())
MODELS = ("qwen2.5-coder-0.5b-instruct", "all-minilm-l6-v2", "qwen2.5-coder-1.5b-instruct")

TOKENS = 32
"""Enough for a label or a sentence; a slow core takes a second for one or two of them."""

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    for model in MODELS:
        fetch(model)
    with serving(tmp_path_factory.mktemp("real"), ROOT / "configs" / "cpu_demo.yaml") as running:
        yield running


def play(running: Running, name: str, turns: int, **headers: str) -> Dialogue:
    dialogue = Dialogue(running, name, **headers)
    for query in DIALOGUES[name][:turns]:
        dialogue.say(query, max_tokens=TOKENS)
    return dialogue


def test_ticket_labels_move_to_the_plain_surrogate_which_gives_the_same_ones(real_server: Running) -> None:
    dialogue = play(real_server, "topic-change", 4)
    found = real_server.until("topic-change", "SWITCHED")
    assert found["serving"] == "plain"
    assert found["training"]["acceptance"]["numbers"]["candidates"]["plain"]["turns"] == [1, 2, 3, 4]
    answer = dialogue.say(DIALOGUES["topic-change"][4], max_tokens=TOKENS)
    assert dialogue.headers["X-SOMA-Engine"] == "surrogate"
    assert '"technical"' in answer


def test_a_forced_session_is_served_by_an_adapter_that_ray_trained_on_it(real_server: Running) -> None:
    dialogue = play(real_server, "house-style", 4, **{"X-SOMA-Force": "adapter"})
    found = real_server.until("house-style", "SWITCHED", "ORIGINAL_ONLY")
    assert found["phase"] == "SWITCHED"
    trained = next(event["data"] for event in found["events"] if event["kind"] == "trained")
    assert trained["losses"][-1] < trained["losses"][0]
    answer = dialogue.say(DIALOGUES["house-style"][4], max_tokens=TOKENS)
    assert dialogue.headers["X-SOMA-Adapter"] == found["adapter"]
    assert len(answer.split()) >= 2
