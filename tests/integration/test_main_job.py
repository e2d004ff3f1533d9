"""The main job on a real vLLM pair, real Ray and a real database, with tiny random models."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from support.guard import GUARD_S
from support.server import Dialogue, Running, adapted, descendants


def test_a_dialogue_warms_up_gets_its_adapter_and_moves_to_the_surrogate(tiny_server: Running) -> None:
    dialogue = Dialogue(tiny_server, "whole", **{"X-SOMA-Force": "adapter"})
    for number in range(1, 4):
        dialogue.say(f"question {number}")
        assert dialogue.headers["X-SOMA-Engine"] == "original"
        assert dialogue.headers["X-SOMA-Phase"] == "WARM_START"
    found = tiny_server.until("whole", "SWITCHED")
    kinds = [event["kind"] for event in found["events"]]
    expected = ["training_submitted", "trained", "adapter_published", "adapter_loaded", "judged", "switched"]
    assert [kind for kind in kinds if kind in expected] == expected
    assert found["training"]["hardness"].keys() == {"1", "2"}
    assert dialogue.say("question 4")
    assert dialogue.headers["X-SOMA-Engine"] == "surrogate"
    assert dialogue.headers["X-SOMA-Adapter"] == found["adapter"]


def test_the_last_warm_turn_returns_before_its_training_is_over(tiny_server: Running) -> None:
    dialogue = Dialogue(tiny_server, "prompt", **{"X-SOMA-Force": "adapter"})
    for number in range(1, 4):
        dialogue.say(f"question {number}")
    returned = time.time()
    found = tiny_server.until("prompt", "SWITCHED")
    (trained,) = (event["at"] for event in found["events"] if event["kind"] == "trained")
    assert returned < trained


def test_the_same_answers_come_whole_and_streamed(tiny_server: Running) -> None:
    streamed = Dialogue(tiny_server, "streamed").say("the same question")
    whole = Dialogue(tiny_server, "whole-answer").say("the same question", stream=False)
    assert streamed == whole


def test_the_served_names_are_three_and_adapters_are_not_among_them(tiny_server: Running) -> None:
    adapted(tiny_server, "named")
    names = [model.id for model in tiny_server.client().models.list()]
    assert names == ["soma", "tiny-original", "tiny-surrogate"]


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_an_adapters_name_serves_on_no_route(tiny_server: Running, path: str) -> None:
    name = f"hidden-{path[:4]}"
    adapted(tiny_server, name)
    body = {
        "model": tiny_server.session(name)["adapter"],
        "messages": [{"role": "user", "content": "x"}],
        "prompt": "x",
    }
    answer = httpx.post(f"{tiny_server.root}/v1/{path}", json=body, timeout=GUARD_S)
    assert answer.status_code in (400, 404)


@pytest.mark.parametrize("model", ["tiny-original", "tiny-surrogate"])
def test_the_models_own_names_bypass_dispatch(tiny_server: Running, model: str) -> None:
    raw = tiny_server.client().chat.completions.with_raw_response.create(
        model=model, messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    assert raw.headers["X-SOMA-Reason"] == "bypass"
    assert raw.parse().usage.completion_tokens > 0


def test_health_and_metrics_answer(tiny_server: Running) -> None:
    Dialogue(tiny_server, "counted").say("hello")
    assert tiny_server.get("/health").status_code == 200
    metrics = tiny_server.get("/metrics").text
    assert 'soma_turns_total{adapter="no",engine="original",phase="WARM_START"}' in metrics
    assert "vllm:" in metrics


def test_an_unknown_model_is_an_openai_error(tiny_server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="expected one of soma"):
        tiny_server.client().chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])


def test_a_malformed_request_is_refused_before_any_engine_sees_it(tiny_server: Running) -> None:
    answer = httpx.post(f"{tiny_server.root}/v1/chat/completions", json={"model": "soma"}, timeout=GUARD_S)
    assert answer.status_code == 400
    assert "messages" in answer.json()["error"]["message"]


def test_a_session_of_another_key_is_not_found(tiny_server: Running) -> None:
    Dialogue(tiny_server, "mine", key="one").say("hello")
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        tiny_server.session("mine", key="two")


def test_no_conversation_text_is_shown_or_logged(tiny_server: Running) -> None:
    Dialogue(tiny_server, "quiet").say("a very secret pomegranate")
    assert "pomegranate" not in str(tiny_server.session("quiet"))
    for log in tiny_server.run_dir.glob("*.log"):
        assert "pomegranate" not in log.read_text()


def test_many_sessions_and_both_plain_models_are_served_at_once(tiny_server: Running) -> None:
    dialogues = [adapted(tiny_server, f"many-{number}") for number in range(3)]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(Dialogue(tiny_server, f"other-{n}").say, "something else") for n in range(4)]
        answers = list(pool.map(lambda d: d.say("the next question"), dialogues))
    assert all(answers)
    assert all(other.result() for other in others)
    names = [tiny_server.session(f"many-{number}")["adapter"] for number in range(3)]
    assert [d.headers["X-SOMA-Adapter"] for d in dialogues] == names
    assert len(set(names)) == 3


def test_a_killed_original_is_refused_clearly_and_comes_back(tiny_server: Running) -> None:
    (leader,) = (
        pid
        for pid in descendants(tiny_server.process.pid)
        if os.getsid(pid) == pid and "original.sock" in command_line(pid)
    )
    os.kill(leader, signal.SIGKILL)
    refusal = until_refused(tiny_server)
    assert refusal.status_code == 503
    assert int(refusal.response.headers["Retry-After"]) > 0
    assert "original" in refusal.message
    assert until_answered(tiny_server)


def until_refused(running: Running) -> openai.APIStatusError:
    """The first refusal; a server that never refuses fails the test."""
    for number in range(100):
        try:
            Dialogue(running, f"down-{number}").say("hello", max_tokens=1)
        except openai.InternalServerError as error:
            return error
        time.sleep(0.05)
    raise AssertionError("a killed original was never missed")


def until_answered(running: Running) -> str:
    """The first answer after the restart."""
    deadline = time.monotonic() + GUARD_S
    while time.monotonic() < deadline:
        try:
            return Dialogue(running, "back").say("hello again")
        except openai.InternalServerError:
            time.sleep(1)
    raise AssertionError("the original did not come back")


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
