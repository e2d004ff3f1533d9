"""Items as chat messages, and whose instructions a prompt begins with."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_vllm.api.responses.input_items import messages_of, prompt
from soma_vllm.errors import BadRequest
from soma_vllm.sessions.state.transcript import read, says

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "hi"}
MORE = {"role": "user", "content": "more"}


def message(role: str, *parts: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": list(parts), **extra}


def text(said: str, kind: str = "input_text") -> dict[str, Any]:
    return {"type": kind, "text": said}


CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": "{}"}
CHAT_CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def test_plain_text_is_what_the_user_says() -> None:
    assert messages_of("hello") == [USER]


@pytest.mark.parametrize(
    "item",
    [
        USER,
        {"type": "message", **USER},
        message("user", text("hello")),
        message("user", text("hello"), id="msg_1", status="completed"),
    ],
)
def test_a_message_is_the_same_in_every_form_it_may_come_in(item: dict[str, Any]) -> None:
    assert messages_of([item]) == [USER]


def test_several_texts_of_a_message_are_lines_of_one() -> None:
    assert messages_of([message("user", text("a"), text("b"))]) == [{"role": "user", "content": "a\nb"}]


def test_a_developer_is_a_system() -> None:
    items = [{"role": "developer", "content": "be brief"}, message("system", text("be kind"))]
    assert messages_of(items) == [
        {"role": "system", "content": "be brief"},
        {"role": "system", "content": "be kind"},
    ]


def test_images_stand_beside_the_text() -> None:
    url = "data:image/png;base64,AA=="
    images = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_image", "image_url": url, "detail": "low"},
    ]
    assert messages_of([message("user", text("see"), *images)]) == [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "see"},
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
            ],
        }
    ]


def test_what_a_model_answered_in_several_items_is_one_message() -> None:
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "xyz"}
    items = [
        USER,
        thought,
        message("assistant", text("I look.", "output_text")),
        CALL,
        {**CALL, "call_id": "call_2"},
        {"type": "function_call_output", "call_id": "call_1", "output": "sun"},
        {"type": "function_call_output", "call_id": "call_2", "output": [text("rain")]},
        message("assistant", text("Both.", "output_text")),
        MORE,
    ]
    calls = [CHAT_CALL, {**CHAT_CALL, "id": "call_2"}]
    assert messages_of(items) == [
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "sun"},
        {"role": "tool", "tool_call_id": "call_2", "content": "rain"},
        {"role": "assistant", "content": "Both."},
        MORE,
    ]


def test_words_after_a_call_belong_to_its_message() -> None:
    items = [USER, CALL, message("assistant", text("I look.", "output_text"))]
    assert messages_of(items)[1:] == [{"role": "assistant", "content": "I look.", "tool_calls": [CHAT_CALL]}]


def test_two_answers_stay_two_messages() -> None:
    assert messages_of([ANSWER, ANSWER, USER]) == [ANSWER, ANSWER, USER]


def test_a_refusal_is_an_answer() -> None:
    part = {"type": "refusal", "refusal": "no"}
    assert messages_of([message("assistant", part)]) == [{"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "item_reference", "id": "msg_1"}, "input[1].type"),
        ({"type": "web_search_call", "id": "ws_1"}, "input[1].type"),
        ({"type": ["message"]}, "input[1].type"),
        ({}, "input[1].type"),
        ({"role": "robot", "content": "x"}, "input[1].role"),
        ({"role": "user"}, "input[1].content"),
        ({"role": "user", "content": 5}, "input[1].content"),
        ({"role": "user", "content": ["x"]}, "input[1].content[0]"),
        (message("user", {"type": "input_file", "file_id": "f"}), "input[1].content[0].type"),
        (message("user", {"type": "text", "text": "x"}), "input[1].content[0].type"),
        (message("user", {"type": "input_text"}), "input[1].content[0].text"),
        (message("user", {"type": "input_image", "file_id": "f"}), "input[1].content[0].file_id"),
        (message("user", {"type": "input_image"}), "input[1].content[0].image_url"),
        (
            message("user", {"type": "input_image", "image_url": "u", "detail": "original"}),
            "input[1].content[0].detail",
        ),
        (message("assistant", {"type": "input_image", "image_url": "u"}), "input[1].content[0].type"),
        ({**CALL, "arguments": {}}, "input[1].arguments"),
        ({**CALL, "call_id": None}, "input[1].call_id"),
        ({"type": "function_call_output", "output": "x"}, "input[1].call_id"),
        ({"type": "function_call_output", "call_id": "c"}, "input[1].output"),
    ],
)
def test_an_item_that_cannot_be_used_is_refused_by_its_place(item: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        messages_of([USER, item])
    assert caught.value.param == param


@pytest.mark.parametrize("items", [[], [{"type": "reasoning", "id": "rs_1", "summary": []}]])
def test_an_input_that_says_nothing_is_refused(items: list[dict[str, Any]]) -> None:
    with pytest.raises(BadRequest) as caught:
        messages_of(items)
    assert caught.value.param == "input"


# -- instructions ---------------------------------------------------------------------------------------


def transcript(*messages: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """As it comes back from the record."""
    kept: list[dict[str, Any]] = json.loads(json.dumps(messages))
    return tuple(kept)


def same(one: Any, other: Any) -> bool:
    return read("t", one).asked == read("t", other).asked


def test_instructions_come_first_and_say_what_a_system_message_says() -> None:
    system = {"role": "system", "content": "be brief"}
    assert same(prompt("be brief", (), [USER]), [system, USER])


def test_the_same_instructions_leave_the_transcript_as_it_was() -> None:
    first = prompt("be brief", (), [USER])
    second = prompt("be brief", transcript(*first, ANSWER), [MORE])
    assert second == [*first, ANSWER, MORE]


def test_instructions_are_not_carried_over() -> None:
    first = prompt("be brief", (), [USER])
    assert prompt(None, transcript(*first, ANSWER), [MORE]) == [USER, ANSWER, MORE]
    other = prompt("be rich", transcript(*first, ANSWER), [MORE])
    assert other == [*prompt("be rich", (), [USER]), ANSWER, MORE]


def test_a_system_message_of_the_input_stays_in_the_dialogue() -> None:
    system = messages_of([message("developer", text("be brief"))])
    first = prompt(None, (), [*system, USER])
    assert prompt(None, transcript(*first, ANSWER), [MORE]) == [*system, USER, ANSWER, MORE]
    beside = prompt("be kind", transcript(*first, ANSWER), [MORE])
    assert beside == [*prompt("be kind", (), system), USER, ANSWER, MORE]


def test_instructions_that_the_dialogue_begins_with_anyway_are_not_said_twice() -> None:
    system = {"role": "system", "content": "be brief"}
    assert same(prompt("be brief", (system, USER, ANSWER), [MORE]), [system, USER, ANSWER, MORE])


def test_empty_instructions_are_none() -> None:
    assert prompt("", (), [USER]) == [USER]


@given(st.text(min_size=1), st.text(min_size=1), st.text())
def test_whatever_they_say_they_are_told_from_input(first: str, then: str, system: str) -> None:
    given_system = messages_of([{"role": "system", "content": system}])
    one = prompt(first, (), [*given_system, USER])
    two = prompt(then, transcript(*one, ANSWER), [MORE])
    assert two == [*prompt(then, (), given_system), USER, ANSWER, MORE]
    assert says(two[0])[1] == then.strip()
