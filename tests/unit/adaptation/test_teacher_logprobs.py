"""Log-probabilities in a user's own request: taken off the reply, kept with the turn, handed to the trainer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.services import Build, Services

from soma_vllm.adaptation.teacher_logprobs import (
    LogprobCapture,
    TeacherLogprobs,
    can_be_added_to,
    why_text,
    without_logprobs,
)
from soma_vllm.config import Config, parse_config
from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.fake import FakeEngine, token_of
from soma_vllm.engines.logprobs import teaching_fields
from soma_vllm.engines.reply_parser import Choice, ParsedReply
from soma_vllm.errors import EngineRefused
from soma_vllm.scheduler.dispatcher import Answer
from soma_vllm.sessions.erasure import TextCache
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Event, Example, SessionKey, Teacher, Usage

ANSWER = 'Grüße, {"logprobs":{"content":[]}} and\n"delta":{}, done 🙂'
ADDED = teaching_fields(3)
KEY, OTHER = SessionKey("t", "s"), SessionKey("t", "other")


def heard(text: str = "an answer", tokens: int | None = None, complete: bool = True) -> ParsedReply:
    return ParsedReply((Choice(text),), Usage(completion_tokens=tokens), complete, None, 0.1)


def entry(token: int) -> dict[str, Any]:
    shown = {"token": f"token_id:{token}", "logprob": -0.5, "bytes": None}
    return {**shown, "top_logprobs": [shown]}


def whole(tokens: Sequence[int], text: str) -> int | None:
    return len(tokens)


def lesson_of(*tokens: int) -> LogprobCapture:
    lesson = LogprobCapture()
    lesson.whole({"choices": [{"message": {}, "logprobs": {"content": [entry(t) for t in tokens]}}]})
    return lesson


def example(turn: int, answer: str = "an answer") -> Example:
    return Example(turn, ({"role": "user", "content": "?"},), answer)


async def events_of(answer: Answer) -> list[str]:
    assert answer.reply.events is not None
    return [event async for event in answer.reply.events]


# -- taking them off ------------------------------------------------------------------------------------


async def test_a_stream_is_byte_for_byte_what_it_would_have_been() -> None:
    engine, body = FakeEngine(answers=[ANSWER]), {"messages": [], "stream": True}
    bare = (await engine.chat(ChatCall(body))).events
    full = (await engine.chat(ChatCall({**body, **ADDED}))).events
    assert bare is not None
    assert full is not None
    raw = [event async for event in full]
    stripped = without_logprobs(await engine.chat(ChatCall({**body, **ADDED})), LogprobCapture()).events
    assert stripped is not None
    expected = [event async for event in bare]
    assert raw != expected
    assert [event async for event in stripped] == expected


async def test_a_whole_reply_is_field_for_field_what_it_would_have_been() -> None:
    engine = FakeEngine(answers=[ANSWER])
    bare = await engine.chat(ChatCall({"messages": []}))
    full = await engine.chat(ChatCall({"messages": [], **ADDED}))
    assert full.body != bare.body
    stripped = without_logprobs(full, LogprobCapture()).body
    assert json.dumps(stripped) == json.dumps(bare.body)


@pytest.mark.parametrize("stream", [True, False])
async def test_every_token_is_heard_in_order_with_the_end_of_turn(stream: bool) -> None:
    engine, lesson = FakeEngine(answers=["one two three"]), LogprobCapture()
    reply = await engine.chat(ChatCall({"messages": [], "stream": stream, **ADDED}))
    reply = without_logprobs(reply, lesson)
    if reply.events is not None:
        _ = [event async for event in reply.events]
    teacher = lesson.teacher(heard("one two three", 4), whole)
    assert teacher is not None
    assert teacher.tokens == tuple(token_of(word) for word in ("one", "two", "three", "<end>"))
    assert teacher.top.shape == teacher.logprobs.shape == (4, 3)
    assert teacher.top[:, 0].tolist() == list(teacher.tokens)


async def test_closing_a_stream_early_stops_the_generation() -> None:
    engine = FakeEngine(answers=["one two three"])
    reply = without_logprobs(
        await engine.chat(ChatCall({"messages": [], "stream": True, **ADDED})), LogprobCapture()
    )
    assert reply.events is not None
    await reply.events.aclose()
    assert engine.closed_early.is_set()


def event_of(delta: dict[str, Any], finish: str | None, *tokens: int) -> str:
    choice = {"index": 0, "delta": delta, "logprobs": {"content": [entry(t) for t in tokens]}}
    chunk = {"choices": [{**choice, "finish_reason": finish}], "usage": {"reasoning_tokens": 0}}
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


def test_an_event_sent_for_its_log_probabilities_alone_is_not_sent_on_but_heard() -> None:
    lesson = LogprobCapture()
    assert lesson.event(event_of({}, None, 1)) is None
    assert lesson.event(event_of({"content": "a"}, None, 2)) is not None
    assert lesson.event(event_of({}, "stop", 3)) is not None
    teacher = lesson.teacher(heard(), whole)
    assert teacher is not None
    assert teacher.tokens == (1, 2, 3)


@pytest.mark.parametrize("delta", [{"reasoning": "so"}, {"tool_calls": [{"index": 0}]}])
def test_tokens_that_are_not_of_the_answer_make_no_teacher(delta: dict[str, Any]) -> None:
    lesson = LogprobCapture()
    lesson.event(event_of(delta, None, 1))
    assert lesson.teacher(heard(), whole) is None


@pytest.mark.parametrize(
    "said", [heard(complete=False), heard(tokens=3)], ids=["cut off", "more tokens counted than shown"]
)
def test_what_is_not_the_whole_answer_makes_no_teacher(said: ParsedReply) -> None:
    assert lesson_of(1, 2).teacher(said, whole) is None
    assert lesson_of(1, 2).teacher(heard(tokens=2), whole) is not None


def test_tokens_that_spell_nothing_of_the_answer_are_left_out_and_others_make_no_teacher() -> None:
    teacher = lesson_of(1, 2, 3).teacher(heard(tokens=3), lambda tokens, text: 2)
    assert teacher is not None
    assert teacher.tokens == (1, 2)
    assert teacher.top.tolist() == [[1], [2]]
    assert len(teacher.logprobs) == 2
    assert lesson_of(1, 2, 3).teacher(heard(tokens=3), lambda tokens, text: None) is None


def test_log_probabilities_in_another_shape_are_taken_off_all_the_same() -> None:
    lesson = LogprobCapture()
    shown = {"content": [{"token": "secret", "top_logprobs": [{"token": "a", "logprob": -1.0}]}]}
    body = lesson.whole({"choices": [{"message": {"content": "x"}, "logprobs": shown}]})
    assert body["choices"] == [{"message": {"content": "x"}, "logprobs": None}]
    assert lesson.teacher(heard(), whole) is None


def test_rows_of_different_width_are_padded() -> None:
    lesson = lesson_of(1)
    wide = {**entry(2), "top_logprobs": [{"token": f"token_id:{t}", "logprob": -t} for t in (1, 2)]}
    lesson.whole({"choices": [{"message": {}, "logprobs": {"content": [wide]}}]})
    teacher = lesson.teacher(heard(), whole)
    assert teacher is not None
    assert teacher.top.tolist() == [[1, -1], [1, 2]]
    assert np.isneginf(teacher.logprobs[0, 1])


# -- whom to ask ----------------------------------------------------------------------------------------


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


def test_each_reason_to_teach_by_text_is_named() -> None:
    def why(speaks_vllm: bool = True, same: bool = True, **settings: Any) -> str | None:
        return why_text(parse_config(settings, "test"), speaks_vllm, same)

    assert why() is None
    assert why(lora={"objective": "nll"}) == "lora.objective is nll"
    assert why(original={"top_logprobs": 0}) == "original.top_logprobs is 0"
    assert why(adaptation={"candidates": ["plain"]}) == "adaptation.candidates has no adapter"
    assert why(speaks_vllm=False) == "the original is not known to be a vLLM (original.api)"
    assert why(same=False) == "the original's tokenizer is not the surrogate's"


def test_a_rolled_back_session_is_heard_only_while_it_may_be_trained_again() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    back = Session(KEY, phase=Phase.ROLLED_BACK)
    assert teacher_logprobs.fields(back, {"messages": []})
    assert not teacher_logprobs.fields(replace(back, trainings=3), {"messages": []})


# -- keeping them ---------------------------------------------------------------------------------------


def test_a_teacher_goes_only_with_the_answer_it_was_heard_with() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    teacher_logprobs.keep(KEY, 1, heard("an answer"), lesson_of(1, 2))
    mine, changed, later = teacher_logprobs.attach(KEY, [example(1), example(1, "another"), example(2)])
    assert mine.teacher is not None
    assert changed.teacher is later.teacher is None
    assert teacher_logprobs.attach(OTHER, [example(1)])[0].teacher is None


def test_a_turn_that_is_replaced_takes_its_teacher_and_the_later_ones_with_it() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    for turn in (1, 2, 3):
        teacher_logprobs.keep(KEY, turn, heard(), lesson_of(turn))
    teacher_logprobs.keep(KEY, 2, heard(), None)
    found = teacher_logprobs.attach(KEY, [example(turn) for turn in (1, 2, 3)])
    assert [item.teacher is not None for item in found] == [True, False, False]


OVER = ["switched", "adaptation_abandoned", "closed"]


@pytest.mark.parametrize("kind", OVER)
def test_what_no_adaptation_needs_any_more_is_dropped(kind: str) -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    teacher_logprobs.keep(KEY, 1, heard(), lesson_of(1))
    assert kind in teacher_logprobs.kinds
    teacher_logprobs(KEY, Event(kind, 0.0, {}))
    assert teacher_logprobs.attach(KEY, [example(1)])[0].teacher is None


def test_what_is_erased_of_a_session_or_of_an_age_is_dropped() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    assert isinstance(teacher_logprobs, TextCache)
    other = SessionKey(KEY.tenant, "other")
    for key in (KEY, other):
        teacher_logprobs.keep(key, 1, heard(), lesson_of(1))
    teacher_logprobs.forget(KEY)
    assert teacher_logprobs.attach(KEY, [example(1)])[0].teacher is None
    teacher_logprobs.forget_before(1.0)
    assert teacher_logprobs.attach(other, [example(1)])[0].teacher is not None
    teacher_logprobs.forget_before(4.0e9)
    assert teacher_logprobs.attach(other, [example(1)])[0].teacher is None


def test_no_more_is_kept_of_a_session_than_a_training_takes() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)  # a window of four turns
    for turn in range(1, 8):
        teacher_logprobs.keep(KEY, turn, heard(), lesson_of(turn))
    found = teacher_logprobs.attach(KEY, [example(turn) for turn in range(1, 8)])
    assert [item.teacher is not None for item in found] == [False] * 3 + [True] * 4


def test_a_session_in_training_is_heard_in_case_it_comes_to_nothing() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    adapting = Session(KEY, phase=Phase.ADAPTING, trainings=1)
    assert teacher_logprobs.fields(adapting, {"messages": []})
    assert not teacher_logprobs.fields(replace(adapting, trainings=3), {"messages": []})


def test_a_branch_has_the_teachers_of_the_turns_it_begins_with() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    for turn in (1, 2, 3):
        teacher_logprobs.keep(KEY, turn, heard(), lesson_of(turn))
    branch = SessionKey(KEY.tenant, "branch")
    teacher_logprobs(branch, Event("branched", 0.0, {"of": KEY.session, "turns": [{}, {}]}))
    teacher_logprobs(KEY, Event("closed", 0.0, {}))
    found = teacher_logprobs.attach(branch, [example(turn) for turn in (1, 2, 3)])
    assert [item.teacher is not None for item in found] == [True, True, False]


def test_beyond_its_bound_the_store_forgets_the_sessions_heard_longest_ago() -> None:
    one = 4 * (4 + 4 + 36)  # four positions of one alternative each
    teacher_logprobs = TeacherLogprobs(Config(), None, kept_bytes=2 * one)
    keys = [SessionKey("t", str(number)) for number in range(3)]
    for key in keys:
        teacher_logprobs.keep(key, 1, heard(), lesson_of(1, 2, 3, 4))
    known = [teacher_logprobs.attach(key, [example(1)])[0].teacher is not None for key in keys]
    assert known == [False, True, True]
    teacher_logprobs.keep(OTHER, 1, heard(), lesson_of(*range(1, 20)))  # alone too large
    assert teacher_logprobs.attach(OTHER, [example(1)])[0].teacher is None


# -- in the house ---------------------------------------------------------------------------------------


async def taught(build: Build, **changes: Any) -> Services:
    services = build(original={"api": "vllm", "top_logprobs": 3}, lora={"objective": "kd"}, **changes)
    await services.registry.start()
    services.surrogate.answers = ["different", "same"]
    return services


def submitted(services: Services) -> dict[str, Any]:
    (data,) = (dict(event.data) for _, event in services.events if event.kind == "training_submitted")
    return data


@pytest.mark.parametrize("stream", [True, False])
async def test_a_warm_start_is_heard_without_the_clients_noticing(build: Build, stream: bool) -> None:
    services, untaught = await taught(build), build()
    await untaught.registry.start()
    said: list[list[Any]] = [[], []]
    for key, mine, each in zip(("one", "other"), said, (services, untaught), strict=True):
        history: list[dict[str, Any]] = []
        for number in (1, 2):
            answer = await each.say(history, f"question {number}", f"stream-{stream}", stream=stream, key=key)
            mine.append(await events_of(answer) if stream else answer.reply.body)
            if stream:
                history.append({"role": "assistant", "content": "same"})
        await each.settled()
    assert said[0] == said[1]
    assert all(call.body["top_logprobs"] == 3 for call in services.original.calls)
    assert not any("logprobs" in call.body for call in untaught.original.calls)
    (request,) = services.trainer.requests
    for item in (*request.examples, *request.held_out):
        assert isinstance(item.teacher, Teacher)
        assert item.teacher.tokens == (token_of("same"), token_of("<end>"))
    assert submitted(services)["teacher"] == "logprobs"
    assert "why" not in submitted(services)


async def test_log_probabilities_the_client_asked_for_are_its_own(build: Build) -> None:
    services = await taught(build)
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        answer = await services.say(history, f"question {number}", logprobs=True, top_logprobs=2)
        assert answer.reply.body is not None
        (word, _) = answer.reply.body["choices"][0]["logprobs"]["content"]
        assert (word["token"], len(word["top_logprobs"])) == ("same", 2)
    await services.settled()
    assert all("return_tokens_as_token_ids" not in call.body for call in services.original.calls)
    assert submitted(services)["teacher"] == "text"
    assert submitted(services)["why"] == "the original's log-probabilities were not heard with these answers"


async def test_a_turn_without_a_teacher_among_others_is_named(build: Build) -> None:
    services = await taught(build, warm_window=3)
    history: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        await services.say(history, f"question {number}", **({"stop": ["x"]} if number == 1 else {}))
    await services.settled()
    data = submitted(services)
    assert (data["turns"], data["teacher"], data["text_turns"]) == ([1, 2], "logprobs", [1])


async def test_after_a_restart_text_teaches(build: Build) -> None:
    first = await taught(build)
    history: list[dict[str, Any]] = []
    await first.say(history, "question 1")
    await first.registry.stop()
    second = await taught(build)
    await second.say(history, "question 2")
    await second.settled()
    assert submitted(second)["teacher"] == "text"


async def test_a_refusal_of_what_was_added_is_not_the_clients(build: Build) -> None:
    services = await taught(build)
    ask = services.original.chat

    class Limited(FakeEngine):
        async def chat(self, call: ChatCall) -> Any:
            if call.body.get("top_logprobs"):
                raise EngineRefused(400, {"error": {"message": "at most 0 log-probabilities"}})
            return await ask(call)

    services.dispatcher._original = Limited("large")
    answer = await services.say([], "question 1")
    assert answer.reply.body is not None
    assert answer.reply.body["choices"][0]["message"]["content"] == "same"


async def test_log_probabilities_are_neither_on_record_nor_asked_for_once_switched(build: Build) -> None:
    services = await taught(build, gate={"locality_threshold": 0.0})
    history: list[dict[str, Any]] = []
    for number in (1, 2, 3):
        await services.say(history, f"question {number}")
        await services.settled()
    assert "switched" in services.kinds()
    assert "logprobs" not in services.original.calls[-1].body
    shown = json.dumps([dict(event.data) for _, event in services.events], default=str)
    assert "token_id" not in shown
    assert "top_logprobs" not in shown
    assert services.teacher_logprobs._bytes == 0
