"""Log-probabilities that we asked for, taken off a reply."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.fake_engine import FakeEngine, token_of

from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.logprob_capture import LogprobCapture, can_be_added_to
from soma_vllm.engines.logprobs import teaching_fields
from soma_vllm.engines.reply_parser import Choice, ParsedReply
from soma_vllm.types import Usage

ANSWER = 'Grüße, {"logprobs":{"content":[]}} and\n"delta":{}, done 🙂'
ADDED = teaching_fields(3)


def reply_of(text: str = "an answer", tokens: int | None = None, complete: bool = True) -> ParsedReply:
    return ParsedReply((Choice(text),), Usage(completion_tokens=tokens), complete, None, 0.1)


def entry(token: int) -> dict[str, Any]:
    shown = {"token": f"token_id:{token}", "logprob": -0.5, "bytes": None}
    return {**shown, "top_logprobs": [shown]}


def whole(tokens: Sequence[int], text: str) -> int | None:
    return len(tokens)


def capture_of(*tokens: int) -> LogprobCapture:
    capture = LogprobCapture()
    capture.strip_body({"choices": [{"message": {}, "logprobs": {"content": [entry(t) for t in tokens]}}]})
    return capture


async def test_a_stream_is_byte_for_byte_what_it_would_have_been() -> None:
    engine, body = FakeEngine(answers=[ANSWER]), {"messages": [], "stream": True}
    bare = (await engine.chat(ChatCall(body))).events
    full = (await engine.chat(ChatCall({**body, **ADDED}))).events
    assert bare is not None
    assert full is not None
    raw = [event async for event in full]
    stripped = LogprobCapture().take_off(await engine.chat(ChatCall({**body, **ADDED}))).events
    assert stripped is not None
    expected = [event async for event in bare]
    assert raw != expected
    assert [event async for event in stripped] == expected


async def test_a_whole_reply_is_field_for_field_what_it_would_have_been() -> None:
    engine = FakeEngine(answers=[ANSWER])
    bare = await engine.chat(ChatCall({"messages": []}))
    full = await engine.chat(ChatCall({"messages": [], **ADDED}))
    assert full.body != bare.body
    stripped = LogprobCapture().take_off(full).body
    assert json.dumps(stripped) == json.dumps(bare.body)


@pytest.mark.parametrize("stream", [True, False])
async def test_every_token_is_captured_in_order_with_the_end_of_turn(stream: bool) -> None:
    engine, capture = FakeEngine(answers=["one two three"]), LogprobCapture()
    reply = await engine.chat(ChatCall({"messages": [], "stream": stream, **ADDED}))
    reply = capture.take_off(reply)
    if reply.events is not None:
        _ = [event async for event in reply.events]
    teacher = capture.teacher(reply_of("one two three", 4), whole)
    assert teacher is not None
    assert teacher.tokens == tuple(token_of(word) for word in ("one", "two", "three", "<end>"))
    assert teacher.top.shape == teacher.logprobs.shape == (4, 3)
    assert teacher.top[:, 0].tolist() == list(teacher.tokens)


async def test_closing_a_stream_early_stops_the_generation() -> None:
    engine = FakeEngine(answers=["one two three"])
    reply = LogprobCapture().take_off(await engine.chat(ChatCall({"messages": [], "stream": True, **ADDED})))
    assert reply.events is not None
    await reply.events.aclose()
    assert engine.closed_early.is_set()


def event_of(delta: dict[str, Any], finish: str | None, *tokens: int) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": {"content": [entry(t) for t in tokens]}}
    chunk = {"choices": [{**choice, "finish_reason": finish}], "usage": {"reasoning_tokens": 0}}
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


def test_an_event_sent_for_its_log_probabilities_alone_is_not_sent_on_but_reply_of() -> None:
    capture = LogprobCapture()
    assert capture.strip_event(event_of({}, None, 1)) is None
    assert capture.strip_event(event_of({"content": "a"}, None, 2)) is not None
    assert capture.strip_event(event_of({}, "stop", 3)) is not None
    teacher = capture.teacher(reply_of(), whole)
    assert teacher is not None
    assert teacher.tokens == (1, 2, 3)


@pytest.mark.parametrize("delta", [{"reasoning": "so"}, {"tool_calls": [{"index": 0}]}])
def test_tokens_that_are_not_of_the_answer_make_no_teacher(delta: dict[str, Any]) -> None:
    capture = LogprobCapture()
    capture.strip_event(event_of(delta, None, 1))
    assert capture.teacher(reply_of(), whole) is None


@pytest.mark.parametrize(
    "said", [reply_of(complete=False), reply_of(tokens=3)], ids=["cut off", "more tokens counted than shown"]
)
def test_what_is_not_the_whole_answer_makes_no_teacher(said: ParsedReply) -> None:
    assert capture_of(1, 2).teacher(said, whole) is None
    assert capture_of(1, 2).teacher(reply_of(tokens=2), whole) is not None


def test_tokens_that_spell_nothing_of_the_answer_are_left_out_and_others_make_no_teacher() -> None:
    teacher = capture_of(1, 2, 3).teacher(reply_of(tokens=3), lambda tokens, text: 2)
    assert teacher is not None
    assert teacher.tokens == (1, 2)
    assert teacher.top.tolist() == [[1], [2]]
    assert len(teacher.logprobs) == 2
    assert capture_of(1, 2, 3).teacher(reply_of(tokens=3), lambda tokens, text: None) is None


def test_log_probabilities_in_another_shape_are_taken_off_all_the_same() -> None:
    capture = LogprobCapture()
    shown = {"content": [{"token": "secret", "top_logprobs": [{"token": "a", "logprob": -1.0}]}]}
    body = capture.strip_body({"choices": [{"message": {"content": "x"}, "logprobs": shown}]})
    assert body["choices"] == [{"message": {"content": "x"}, "logprobs": None}]
    assert capture.teacher(reply_of(), whole) is None


def test_rows_of_different_width_are_padded() -> None:
    capture = capture_of(1)
    wide = {**entry(2), "top_logprobs": [{"token": f"token_id:{t}", "logprob": -t} for t in (1, 2)]}
    capture.strip_body({"choices": [{"message": {}, "logprobs": {"content": [wide]}}]})
    teacher = capture.teacher(reply_of(), whole)
    assert teacher is not None
    assert teacher.top.tolist() == [[1, -1], [1, 2]]
    assert np.isneginf(teacher.logprobs[0, 1])


@pytest.mark.parametrize(
    "more",
    [
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 2},
        {"top_logprobs": 2},
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"echo": True},
        {"stop": ["\n"]},
        {"response_format": {"type": "json_object"}},
        {"skip_special_tokens": False},
        {"something_new": 1},
    ],
    ids=str,
)
def test_nothing_is_added_to_a_request_that_is_not_plain(more: dict[str, Any]) -> None:
    assert can_be_added_to({"messages": [], "temperature": 0})
    assert not can_be_added_to({"messages": [], **more})


@pytest.mark.parametrize("more", [{"n": 1}, {"logprobs": False}, {"tools": None}, {"stop": []}], ids=str)
def test_saying_what_is_so_anyway_keeps_a_request_plain(more: dict[str, Any]) -> None:
    assert can_be_added_to({"messages": [], **more})
