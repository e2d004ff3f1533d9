"""Log-probabilities in a user's own request: which turns are asked for them, how they are kept and attached."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from support.fake_engine import token_of
from support.services import Build, Services

from soma_vllm.adaptation.teacher_logprobs import (
    TeacherLogprobs,
    why_text,
)
from soma_vllm.config import Config, parse_config
from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.logprob_capture import LogprobCapture
from soma_vllm.engines.reply_parser import Choice, ParsedReply
from soma_vllm.errors import EngineRefused
from soma_vllm.scheduler.dispatcher import Answer
from soma_vllm.sessions.erasure import TextCache
from soma_vllm.sessions.state.phases import Phase
from soma_vllm.sessions.state.session import Session
from soma_vllm.types import Event, Example, SessionKey, Teacher, Usage

KEY, OTHER = SessionKey("t", "s"), SessionKey("t", "other")


def reply_of(text: str = "an answer", tokens: int | None = None, complete: bool = True) -> ParsedReply:
    return ParsedReply((Choice(text),), Usage(completion_tokens=tokens), complete, None, 0.1)


def entry(token: int) -> dict[str, Any]:
    shown = {"token": f"token_id:{token}", "logprob": -0.5, "bytes": None}
    return {**shown, "top_logprobs": [shown]}


def capture_of(*tokens: int) -> LogprobCapture:
    capture = LogprobCapture()
    capture.strip_body({"choices": [{"message": {}, "logprobs": {"content": [entry(t) for t in tokens]}}]})
    return capture


def example(turn: int, answer: str = "an answer") -> Example:
    return Example(turn, ({"role": "user", "content": "?"},), answer)


async def events_of(answer: Answer) -> list[str]:
    assert answer.reply.events is not None
    return [event async for event in answer.reply.events]


# -- which turns to ask for them on ----------------------------------------------------------------------


def test_each_reason_to_teach_by_text_is_named() -> None:
    def why(speaks_vllm: bool = True, same: bool = True, **settings: Any) -> str | None:
        return why_text(parse_config(settings, "test"), speaks_vllm, same)

    assert why() is None
    assert why(lora={"objective": "nll"}) == "lora.objective is nll"
    assert why(original={"top_logprobs": 0}) == "original.top_logprobs is 0"
    assert why(adaptation={"candidates": ["plain"]}) == "adaptation.candidates has no adapter"
    assert why(speaks_vllm=False) == "the original is not known to be a vLLM (original.api)"
    assert why(same=False) == "the original's tokenizer is not the surrogate's"


def test_a_rolled_back_session_is_asked_only_while_it_may_be_trained_again() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    back = Session(KEY, phase=Phase.ROLLED_BACK)
    assert teacher_logprobs.fields(back, {"messages": []})
    assert not teacher_logprobs.fields(replace(back, trainings=3), {"messages": []})


# -- keeping them ---------------------------------------------------------------------------------------


def test_a_teacher_goes_only_with_the_answer_it_was_captured_with() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    teacher_logprobs.keep(KEY, 1, reply_of("an answer"), capture_of(1, 2))
    mine, changed, later = teacher_logprobs.attach(KEY, [example(1), example(1, "another"), example(2)])
    assert mine.teacher is not None
    assert changed.teacher is later.teacher is None
    assert teacher_logprobs.attach(OTHER, [example(1)])[0].teacher is None


def test_a_turn_that_is_replaced_takes_its_teacher_and_the_later_ones_with_it() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    for turn in (1, 2, 3):
        teacher_logprobs.keep(KEY, turn, reply_of(), capture_of(turn))
    teacher_logprobs.keep(KEY, 2, reply_of(), None)
    found = teacher_logprobs.attach(KEY, [example(turn) for turn in (1, 2, 3)])
    assert [item.teacher is not None for item in found] == [True, False, False]


OVER = ["switched", "adaptation_abandoned", "closed"]


@pytest.mark.parametrize("kind", OVER)
def test_what_no_adaptation_needs_any_more_is_dropped(kind: str) -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    teacher_logprobs.keep(KEY, 1, reply_of(), capture_of(1))
    assert kind in teacher_logprobs.kinds
    teacher_logprobs(KEY, Event(kind, 0.0, {}))
    assert teacher_logprobs.attach(KEY, [example(1)])[0].teacher is None


def test_what_is_erased_of_a_session_or_of_an_age_is_dropped() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    assert isinstance(teacher_logprobs, TextCache)
    other = SessionKey(KEY.tenant, "other")
    for key in (KEY, other):
        teacher_logprobs.keep(key, 1, reply_of(), capture_of(1))
    teacher_logprobs.forget(KEY)
    assert teacher_logprobs.attach(KEY, [example(1)])[0].teacher is None
    teacher_logprobs.forget_before(1.0)
    assert teacher_logprobs.attach(other, [example(1)])[0].teacher is not None
    teacher_logprobs.forget_before(4.0e9)
    assert teacher_logprobs.attach(other, [example(1)])[0].teacher is None


def test_no_more_is_kept_of_a_session_than_a_training_takes() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)  # a window of four turns
    for turn in range(1, 8):
        teacher_logprobs.keep(KEY, turn, reply_of(), capture_of(turn))
    found = teacher_logprobs.attach(KEY, [example(turn) for turn in range(1, 8)])
    assert [item.teacher is not None for item in found] == [False] * 3 + [True] * 4


def test_a_session_in_training_is_asked_in_case_it_comes_to_nothing() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    adapting = Session(KEY, phase=Phase.ADAPTING, trainings=1)
    assert teacher_logprobs.fields(adapting, {"messages": []})
    assert not teacher_logprobs.fields(replace(adapting, trainings=3), {"messages": []})


def test_a_branch_has_the_teachers_of_the_turns_it_begins_with() -> None:
    teacher_logprobs = TeacherLogprobs(Config(), None)
    for turn in (1, 2, 3):
        teacher_logprobs.keep(KEY, turn, reply_of(), capture_of(turn))
    branch = SessionKey(KEY.tenant, "branch")
    teacher_logprobs(branch, Event("branched", 0.0, {"of": KEY.session, "turns": [{}, {}]}))
    teacher_logprobs(KEY, Event("closed", 0.0, {}))
    found = teacher_logprobs.attach(branch, [example(turn) for turn in (1, 2, 3)])
    assert [item.teacher is not None for item in found] == [True, True, False]


def test_beyond_its_bound_the_store_forgets_the_sessions_captured_longest_ago() -> None:
    one = 4 * (4 + 4 + 36)  # four positions of one alternative each
    teacher_logprobs = TeacherLogprobs(Config(), None, kept_bytes=2 * one)
    keys = [SessionKey("t", str(number)) for number in range(3)]
    for key in keys:
        teacher_logprobs.keep(key, 1, reply_of(), capture_of(1, 2, 3, 4))
    known = [teacher_logprobs.attach(key, [example(1)])[0].teacher is not None for key in keys]
    assert known == [False, True, True]
    teacher_logprobs.keep(OTHER, 1, reply_of(), capture_of(*range(1, 20)))  # alone too large
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
async def test_a_warm_start_is_captured_without_the_clients_noticing(build: Build, stream: bool) -> None:
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

    async def limited(call: ChatCall) -> Any:
        if call.body.get("top_logprobs"):
            raise EngineRefused(400, {"error": {"message": "at most 0 log-probabilities"}})
        return await ask(call)

    services.original.chat = limited
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
