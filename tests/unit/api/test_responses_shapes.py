"""The chat completion that a request becomes, and the response that its reply becomes."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses_services import Spoken, checked, token

from soma_vllm.api.responses.convert import Frame, chat_body
from soma_vllm.api.responses.input_items import messages_of, prompt
from soma_vllm.api.responses.request import parse
from soma_vllm.api.responses.stream import response_of
from soma_vllm.engines.vllm.internals import ChatCompletionRequest
from soma_vllm.errors import EngineError
from soma_vllm.sessions.state.transcript import says

USER = [{"role": "user", "content": "hello"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}


def body(**changes: Any) -> dict[str, Any]:
    return chat_body(parse({"input": "hello", **changes}), USER)


def frame(**changes: Any) -> Frame:
    return Frame(parse({"input": "hello", **changes}), "resp_1", "soma", stored=True)


def whole(spoken: Spoken, **changes: Any) -> dict[str, Any]:
    return response_of(frame(**changes), spoken.completion())


# -- asked ----------------------------------------------------------------------------------------------


def test_a_plain_request_asks_for_nothing_but_an_answer() -> None:
    assert body() == {"messages": USER}


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"model": "large"}, {"model": "large"}),
        ({"max_output_tokens": 9}, {"max_completion_tokens": 9}),
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0, "top_p": 0.5}),
        ({"metadata": {"session_id": "s"}}, {"metadata": {"session_id": "s"}}),
        ({"user": "u", "seed": 3, "top_k": 5}, {"user": "u", "seed": 3, "top_k": 5}),
        ({"top_logprobs": 2}, {}),
        (
            {"top_logprobs": 2, "include": ["message.output_text.logprobs"]},
            {"logprobs": True, "top_logprobs": 2},
        ),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True, "top_logprobs": 0}),
        ({"include": ["reasoning.encrypted_content"]}, {}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"text": {"format": {"type": "text"}, "verbosity": "medium"}}, {}),
        ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        ({"truncation": "disabled", "store": True, "safety_identifier": "x"}, {}),
        ({"truncation": "auto"}, {"truncate_prompt_tokens": -1}),
        ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
        ({"tools": [], "tool_choice": "auto", "parallel_tool_calls": True}, {}),
    ],
)
def test_each_parameter_is_asked_of_the_chat(changes: dict[str, Any], asked: dict[str, Any]) -> None:
    assert body(**changes) == {"messages": USER, **asked}


def test_a_schema_for_the_answer_is_nested_as_chats_have_it() -> None:
    wanted = {"type": "json_schema", "name": "city", "schema": PARAMETERS, "strict": True}
    assert body(text={"format": wanted})["response_format"] == {
        "type": "json_schema",
        "json_schema": {"name": "city", "schema": PARAMETERS, "strict": True},
    }


def test_tools_are_nested_as_chats_have_them() -> None:
    asked = body(
        tools=[WEATHER], tool_choice={"type": "function", "name": "weather"}, parallel_tool_calls=False
    )
    function = {"name": "weather", "parameters": PARAMETERS, "strict": True}
    assert asked["tools"] == [{"type": "function", "function": function}]
    assert asked["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert asked["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stream": True, "instructions": "be brief", "truncation": "auto", "max_output_tokens": 9},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}},
        {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [{"type": "function", "name": "bare"}], "tool_choice": "none"},
        {"text": {"format": {"type": "json_schema", "name": "c", "schema": PARAMETERS, "strict": True}}},
        {"text": {"format": {"type": "json_object"}, "verbosity": "low"}},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"reasoning": {"effort": "high"}, "metadata": {"a": "b"}, "user": "u", "seed": 1, "stop": ["x"]},
    ],
)
def test_vllm_takes_the_chat_that_a_request_becomes(changes: dict[str, Any]) -> None:
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "sun"},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA=="}]},
    ]
    asked = parse({"input": items, "model": "large", **changes})
    chat = chat_body(asked, prompt(asked.instructions, (), messages_of(items)))
    taken = ChatCompletionRequest.model_validate(chat)
    # What vLLM does not know of it, it leaves aside.
    assert set(chat) - set(ChatCompletionRequest.model_fields) <= {"metadata", "verbosity"}
    assert len(taken.messages) == 4 + ("instructions" in changes)


# -- answered -------------------------------------------------------------------------------------------


def test_an_answer_is_one_message() -> None:
    found = checked(whole(Spoken()))
    assert found.status == "completed"
    assert found.output_text == "An answer."
    (item,) = found.output
    assert item.type == "message"
    assert item.id.startswith("msg_")
    assert item.status == "completed"
    (part,) = item.content
    assert part.type == "output_text"
    assert part.annotations == []
    assert part.logprobs == []


def test_a_response_shows_its_request() -> None:
    asked = {
        "instructions": "be brief",
        "metadata": {"a": "b"},
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "name": "weather"},
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_output_tokens": 64,
        "max_tool_calls": 3,
        "previous_response_id": "resp_0",
        "truncation": "auto",
        "user": "u",
        "presence_penalty": 0.25,
        "frequency_penalty": 0.75,
        "safety_identifier": "somebody",
        "prompt_cache_key": "a key",
        "text": {"format": {"type": "json_schema", "name": "city", "schema": PARAMETERS}},
        "reasoning": {"effort": "low", "summary": "auto"},
    }
    found = checked(whole(Spoken(), **asked))
    shown = found.model_dump(by_alias=True, exclude_none=True)
    for name, value in asked.items():
        assert shown[name] == value, name
    assert (found.id, found.object, found.model) == ("resp_1", "response", "soma")
    assert abs(found.created_at - time.time()) < 60
    assert found.completed_at is not None
    assert found.error is None
    assert found.incomplete_details is None
    assert found.background is False


def test_what_was_not_asked_for_has_its_default() -> None:
    found = checked(whole(Spoken()))
    assert (found.tools, found.tool_choice, found.parallel_tool_calls) == ([], "auto", True)
    assert (found.metadata, found.truncation, found.previous_response_id) == ({}, "disabled", None)
    assert (found.temperature, found.top_p, found.service_tier) == (1.0, 1.0, "default")
    assert found.text is not None
    assert found.text.format is not None
    assert found.text.format.type == "text"


def test_a_conversation_is_shown_by_its_id() -> None:
    found = checked(whole(Spoken(), conversation="c1"))
    assert found.conversation is not None
    assert found.conversation.id == "c1"


def test_usage_is_counted_as_responses_count() -> None:
    usage = checked(whole(Spoken())).usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (7, 5, 12)
    assert usage.input_tokens_details.cached_tokens == 3
    assert usage.output_tokens_details.reasoning_tokens == 2


def test_an_engine_that_counts_nothing_leaves_usage_open() -> None:
    bare = {name: value for name, value in Spoken().completion().items() if name != "usage"}
    assert checked(response_of(frame(), bare)).usage is None
    assert checked(response_of(frame(), {**bare, "usage": {"prompt_tokens": 4}})).usage is not None


@pytest.mark.parametrize(
    ("finish", "reason"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_that_was_cut_off_is_incomplete(finish: str, reason: str) -> None:
    found = checked(whole(Spoken(finish=finish)))
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == reason
    assert found.completed_at is None
    assert found.output[0].status == "incomplete"


def test_calls_of_tools_are_items_of_their_own() -> None:
    calls = [("call_1", "weather", ['{"city":', ' "Bonn"}']), ("call_2", "weather", ["{}"])]
    found = checked(whole(Spoken(("I look.",), calls, finish="tool_calls")))
    assert [item.type for item in found.output] == ["message", "function_call", "function_call"]
    call = found.output[1]
    assert call.type == "function_call"
    assert (call.call_id, call.name, call.arguments) == ("call_1", "weather", '{"city": "Bonn"}')
    assert call.status == "completed"
    silent = checked(whole(Spoken((), calls)))
    assert [item.type for item in silent.output] == ["function_call", "function_call"]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_thoughts_are_an_item_before_the_answer(name: str) -> None:
    found = checked(whole(Spoken(thoughts=("Let me ", "see."), thoughts_name=name)))
    assert [item.type for item in found.output] == ["reasoning", "message"]
    thought = found.output[0]
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text == "Let me see."


def test_log_probabilities_are_shown_to_those_who_asked() -> None:
    spoken = Spoken(logprobs=True)
    silent = whole(spoken, top_logprobs=2)
    assert silent["output"][0]["content"][0]["logprobs"] == []
    found = checked(whole(spoken, top_logprobs=2, include=["message.output_text.logprobs"]))
    part = found.output[0].content[0]
    assert part.type == "output_text"
    assert [shown.token for shown in part.logprobs or ()] == ["An ", "answer."]
    assert (part.logprobs or [])[0].top_logprobs[1].bytes == []
    assert token("x")["bytes"] == [120]


def test_silence_is_an_empty_answer() -> None:
    found = checked(whole(Spoken(())))
    assert [item.type for item in found.output] == ["message"]
    assert found.output_text == ""


def test_a_refusal_is_what_was_answered() -> None:
    completion = Spoken(()).completion()
    completion["choices"][0]["message"]["refusal"] = "no"
    assert checked(response_of(frame(), completion)).output_text == "no"


def test_a_call_without_an_id_gets_one() -> None:
    completion = Spoken((), [("", "f", ["{}"])]).completion()
    call = checked(response_of(frame(), completion)).output[0]
    assert call.type == "function_call"
    assert call.call_id.startswith("call_")


def test_a_reply_without_a_choice_is_an_engines_failure() -> None:
    with pytest.raises(EngineError, match="found no choice"):
        response_of(frame(), {"object": "chat.completion"})


WORDS = st.lists(st.text(max_size=5), max_size=4)
CALLS = st.lists(st.tuples(st.uuids().map(str), st.sampled_from("fg"), WORDS), max_size=3)


@given(WORDS, CALLS, WORDS)
def test_items_that_are_sent_back_are_the_turn_on_record(
    pieces: list[str], calls: list[tuple[str, str, list[str]]], thoughts: list[str]
) -> None:
    spoken = Spoken(pieces, calls, thoughts)
    (again,) = messages_of(whole(spoken)["output"])
    assert says(again) == says(spoken.message())
    assert checked(whole(spoken)).output
