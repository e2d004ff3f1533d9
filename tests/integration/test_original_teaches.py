"""A real vLLM original that shows its log-probabilities to the trainer, and not to the client."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
from support.guard import GUARD_S
from support.server import Dialogue, Running

from soma_vllm.engines.logprobs import teacher_from_logprobs, teaching_fields
from soma_vllm.models.home import models_dir

QUERY = [{"role": "user", "content": "tell me something"}]


def posted(running: Running, model: str, session: str, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": QUERY, "max_tokens": 12, "temperature": 0, **more}
    headers = {"X-Session-ID": session, "Authorization": "Bearer key"}
    answer = httpx.post(f"{running.root}/v1/chat/completions", json=body, headers=headers, timeout=GUARD_S)
    answer.raise_for_status()
    return answer


def without_its_name(chunk: dict[str, Any]) -> str:
    """What is different in any two replies taken out; the order of fields kept."""
    assert chunk["id"].startswith("chatcmpl-")
    return json.dumps({**chunk, "id": "", "created": 0})


def test_a_whole_warm_start_reply_is_what_the_original_says_by_itself(tiny_server: Running) -> None:
    heard = posted(tiny_server, "soma", "whole-taught").json()
    alone = posted(tiny_server, "tiny-original", "x").json()
    assert heard["choices"][0]["message"]["content"]
    assert without_its_name(heard) == without_its_name(alone)


def spelt(reply: str) -> tuple[list[str], str]:
    """The spelling of a stream's events, told apart from its text: how vLLM groups tokens into events is
    a matter of timing, so equal neighbours count once and their text is joined."""
    shapes: list[str] = []
    text = ""
    for line in reply.split("\n\n"):
        if line.startswith("data: {"):
            choices = json.loads(line.removeprefix("data: "))["choices"]
            text += "".join(choice["delta"].get("content") or "" for choice in choices)
        shape = re.sub(r'"content":"(\\.|[^"\\])*"', '"content":"…"', line)
        shape = re.sub(r'"id":"chatcmpl-[^"]+"|"created":\d+', "", shape)
        if shapes[-1:] != [shape]:
            shapes.append(shape)
    return shapes, text


def test_a_streamed_warm_start_reply_is_what_the_original_says_by_itself(tiny_server: Running) -> None:
    heard, alone = (
        spelt(
            posted(
                tiny_server, model, "stream-taught", stream=True, stream_options={"include_usage": True}
            ).text
        )
        for model in ("soma", "tiny-original")
    )
    shapes, text = heard
    assert len(text) > 10
    assert len(shapes) >= 5
    assert heard == alone


def test_a_client_gets_log_probabilities_when_it_asks_for_them_and_only_then(tiny_server: Running) -> None:
    create = tiny_server.client().chat.completions.create
    request: dict[str, Any] = {"model": "soma", "messages": QUERY, "max_tokens": 4, "temperature": 0}

    def session(name: str) -> dict[str, str]:
        return {"X-Session-ID": name}

    unasked = create(**request, extra_headers=session("unasked"))
    assert unasked.choices[0].logprobs is None
    asked = create(**request, logprobs=True, top_logprobs=2, extra_headers=session("asked"))
    shown = asked.choices[0].logprobs
    assert shown is not None
    assert shown.content is not None
    assert [len(entry.top_logprobs) for entry in shown.content] == [2] * 4
    assert not any(entry.token.startswith("token_id:") for entry in shown.content)
    with create(**request, stream=True, extra_headers=session("unasked-stream")) as stream:
        assert all(choice.logprobs is None for chunk in stream for choice in chunk.choices)
    with create(
        **request, stream=True, logprobs=True, top_logprobs=2, extra_headers=session("asked-stream")
    ) as stream:
        assert any(choice.logprobs is not None for chunk in stream for choice in chunk.choices)


def test_a_session_is_trained_on_what_the_original_showed(tiny_server: Running) -> None:
    assert "teachers   log-probabilities" in tiny_server.said()
    dialogue = Dialogue(tiny_server, "distilled", **{"X-SOMA-Force": "adapter"})
    for number in range(1, 4):
        dialogue.say(f"question {number}", stream=number == 2)
    found = tiny_server.until("distilled", "SWITCHED", "ORIGINAL_ONLY")
    data = {event["kind"]: event["data"] for event in found["events"]}
    assert found["phase"] == "SWITCHED", data.get("training_failed")
    assert data["training_submitted"]["teacher"] == "logprobs"
    assert "text_turns" not in data["training_submitted"]
    assert data["trained"]["distilled"] is True
    assert "token_id" not in str(found)
    for log in tiny_server.run_dir.glob("*.log"):
        assert "token_id:" not in log.read_text()


def test_the_end_of_turn_is_among_the_tokens_shown(tiny_server: Running) -> None:
    config = json.loads((models_dir() / "tiny-original" / "generation_config.json").read_text())
    end = config["eos_token_id"]
    end = end[0] if isinstance(end, list) else end
    more = {**teaching_fields(5), "allowed_token_ids": [end]}
    for stream in (False, True):
        reply = posted(tiny_server, "tiny-original", "x", stream=stream, **more)
        if stream:
            lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if "finish" in line]
            choice = json.loads(lines[-1])["choices"][0]
        else:
            choice = reply.json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert teacher_from_logprobs(choice["logprobs"]["content"]).tokens == (end,)
