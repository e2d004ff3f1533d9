"""What the Responses API may be asked, and by which name the rest is refused."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import response_create_params

from soma_vllm.api.responses.request import INDIFFERENT, PASSED, REFUSED, ResponsesRequest, parse
from soma_vllm.errors import BadRequest

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}
SECRET = "what somebody said"


def refused(**changes: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        parse({"input": "hello", **changes})
    return caught.value


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"background": True, "store": False}, "background"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [WEATHER, {"type": "file_search", "vector_store_ids": ["v"]}]}, "tools[1].type"),
        ({"tools": [{"type": "computer_use_preview"}]}, "tools[0].type"),
        ({"tools": [{"type": "custom", "name": "c"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{**WEATHER, "surprise": 1}]}, "tools[0].surprise"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"include": ["message.thoughts"]}, "include[0]"),
        ({"truncation": "middle"}, "truncation"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 2.5}, "max_output_tokens"),
        ({"reasoning": {"effort": "heroic"}}, "reasoning.effort"),
        ({"metadata": {"n": 1}}, "metadata.n"),
        ({"instructions": 5}, "instructions"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"conversation": {"name": "c"}}, "conversation.id"),
        ({"conversation": "  "}, "conversation"),
        ({"conversation": "c" * 257}, "conversation"),
        ({"conversation": "a\nb"}, "conversation"),
        ({"conversation": "c", "previous_response_id": "resp_1"}, "conversation"),
        ({"previous_response_id": ""}, "previous_response_id"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_wrong_or_not_served_is_refused_by_its_name(changes: dict[str, Any], param: str) -> None:
    error = refused(**changes)
    assert error.param == param
    assert str(error).startswith((param, "found"))


def test_the_refusal_of_a_built_in_tool_says_that_it_is_one() -> None:
    assert "'web_search'" in str(refused(tools=[{"type": "web_search"}]))


@pytest.mark.parametrize("body", [None, [], "hello", 5, True])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    with pytest.raises(BadRequest, match="expected a JSON object"):
        parse(body)


@pytest.mark.parametrize(
    "changes",
    [
        {"instructions": {"text": SECRET}},
        {"input": {"text": SECRET}},
        {"input": [SECRET]},
        {"temperature": SECRET},
        {"metadata": SECRET},
        {"user": [SECRET]},
        {"tools": SECRET},
        {"conversation": [SECRET]},
    ],
)
def test_a_refusal_never_quotes_what_may_be_conversation(changes: dict[str, Any]) -> None:
    assert SECRET not in str(refused(**changes))


def test_null_and_the_default_say_the_same_as_leaving_a_parameter_out() -> None:
    nothing = dict.fromkeys([*ResponsesRequest.model_fields, *REFUSED, *PASSED, *INDIFFERENT])
    assert parse({**nothing, "input": "hello"}) == parse({"input": "hello"})
    parse({"input": "hello", "background": False, "context_management": []})


def test_every_parameter_that_openai_knows_is_served_refused_by_name_or_indifferent() -> None:
    known = set(response_create_params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    decided = set(ResponsesRequest.model_fields) | set(REFUSED) | PASSED | INDIFFERENT
    assert known - decided <= {"access_programs", "image"}


def test_no_parameter_is_decided_twice() -> None:
    names = [*ResponsesRequest.model_fields, *REFUSED, *PASSED, *INDIFFERENT]
    assert len(names) == len(set(names))


def test_a_conversation_is_named_by_its_id_alone_or_in_an_object() -> None:
    assert parse({"input": "x", "conversation": "c1"}).conversation_id == "c1"
    assert parse({"input": "x", "conversation": {"id": "c1"}}).conversation_id == "c1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(sorted({*ResponsesRequest.model_fields, *REFUSED, *PASSED, *INDIFFERENT}))


@given(st.dictionaries(NAMES, JSON, max_size=6))
def test_whatever_is_sent_is_read_or_refused(body: dict[str, Any]) -> None:
    with suppress(BadRequest):
        assert parse(body).input == body["input"]
