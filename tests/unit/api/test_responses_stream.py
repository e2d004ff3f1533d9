"""A chat stream as the events of a response, each read by OpenAI's own types."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.responses_services import (
    BROKEN,
    ChatEvents,
    Spoken,
    checked,
    choice_event,
    event,
    told,
)

from soma_vllm.api.responses.convert import Frame
from soma_vllm.api.responses.request import parse
from soma_vllm.api.responses.stream import ResponseEvents, response_of

DONE = "data: [DONE]\n\n"
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def stream(events: ChatEvents, **changes: Any) -> ResponseEvents:
    asked = parse({"input": "hello", "stream": True, **changes})
    return ResponseEvents(events, Frame(asked, "resp_1", "soma", stored=True))


async def heard(events: ChatEvents | Spoken | list[str], **changes: Any) -> list[dict[str, Any]]:
    """All events, each checked by OpenAI's types, and so the response at their end."""
    source = events if isinstance(events, ChatEvents) else None
    if source is None:
        source = ChatEvents(events.events() if isinstance(events, Spoken) else events)
    found = told([line async for line in stream(source, **changes)])
    checked(found[-1]["response"])
    return found


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [found["type"].removeprefix("response.") for found in events]


async def test_an_answer_is_told_in_openais_order() -> None:
    found = await heard(Spoken())
    assert kinds(found) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [e["delta"] for e in found if "delta" in e] == ["An ", "answer."]
    assert found[6]["text"] == "An answer."
    assert found[0]["response"]["status"] == found[1]["response"]["status"] == "in_progress"
    assert found[0]["response"]["output"] == []
    assert found[2]["item"]["content"] == []
    assert found[2]["item"]["status"] == "in_progress"
    assert found[-2]["item"] == found[-1]["response"]["output"][0]
    assert len({e["item_id"] for e in found if "item_id" in e} | {found[2]["item"]["id"]}) == 1


async def test_thoughts_end_where_the_answer_begins() -> None:
    found = await heard(Spoken(("Yes.",), thoughts=("Let me ", "see.")))
    assert kinds(found)[2:10] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
    ]
    assert [item["type"] for item in found[-1]["response"]["output"]] == ["reasoning", "message"]


async def test_thoughts_end_where_a_call_begins_and_new_ones_are_an_item_of_their_own() -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{}"}}
    deltas: list[dict[str, Any]] = [{"reasoning": "a"}, {"tool_calls": [call]}, {"reasoning": "b"}]
    found = await heard([*map(choice_event, deltas), DONE])
    begun_or_done = [e for e in found if e["type"].startswith("response.output_item")]
    assert [(e["type"].split(".")[-1], e["output_index"]) for e in begun_or_done] == [
        ("added", 0),
        ("done", 0),
        ("added", 1),
        ("added", 2),
        ("done", 1),
        ("done", 2),
    ]
    kept = [item["type"] for item in found[-1]["response"]["output"]]
    assert kept == ["reasoning", "function_call", "reasoning"]


async def test_a_call_is_told_with_its_arguments() -> None:
    calls = [("call_1", "f", ['{"a":', " 1}"]), ("call_2", "g", ["{}"])]
    found = await heard(Spoken((), calls, finish="tool_calls"))
    assert kinds(found)[2:7] == [
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "output_item.added",
        "function_call_arguments.delta",
    ]
    done = [e for e in found if e["type"] == "response.function_call_arguments.done"]
    assert [(e["output_index"], e["arguments"]) for e in done] == [(0, '{"a": 1}'), (1, "{}")]
    output = found[-1]["response"]["output"]
    assert [(item["call_id"], item["name"], item["arguments"]) for item in output] == [
        ("call_1", "f", '{"a": 1}'),
        ("call_2", "g", "{}"),
    ]


async def test_words_on_both_sides_of_a_call_are_one_answer() -> None:
    call = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": "{}"}}
    events = [
        choice_event({"content": "I look"}),
        choice_event({"tool_calls": [call]}),
        choice_event({"content": " now."}, "tool_calls"),
        DONE,
    ]
    output = (await heard(events))[-1]["response"]["output"]
    assert [item["type"] for item in output] == ["message", "function_call"]
    assert output[0]["content"][0]["text"] == "I look now."


async def test_calls_may_come_in_turns() -> None:
    def part(index: int, arguments: str, **more: Any) -> str:
        function = {"arguments": arguments} | ({"name": "f"} if more else {})
        return choice_event({"tool_calls": [{"index": index, "function": function, **more}]})

    events = [part(0, "[", id="a"), part(1, "{", id="b"), part(0, "]"), part(1, "}"), DONE]
    output = (await heard(events))[-1]["response"]["output"]
    assert [item["arguments"] for item in output] == ["[]", "{}"]


async def test_an_answer_that_was_cut_off_ends_incomplete() -> None:
    found = await heard(Spoken(finish="length", thoughts=("Hm.",)))
    assert kinds(found)[-1] == "incomplete"
    assert found[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert [item["status"] for item in found[-1]["response"]["output"]] == ["completed", "incomplete"]


async def test_silence_is_an_empty_answer() -> None:
    found = await heard(Spoken(()))
    assert kinds(found)[2:] == [
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]


async def test_log_probabilities_come_with_their_words() -> None:
    found = await heard(Spoken(logprobs=True), **LOGPROBS)
    deltas = [e for e in found if e["type"] == "response.output_text.delta"]
    assert [[shown["token"] for shown in e["logprobs"]] for e in deltas] == [["An "], ["answer."]]
    part = found[-1]["response"]["output"][0]["content"][0]
    assert [shown["token"] for shown in part["logprobs"]] == ["An ", "answer."]
    plain = await heard(Spoken(logprobs=True))
    assert all(not e.get("logprobs") for e in plain)


async def test_usage_is_in_the_last_event() -> None:
    assert (await heard(Spoken()))[-1]["response"]["usage"]["output_tokens"] == 5


async def test_other_choices_are_not_heard() -> None:
    other = event({"choices": [{"index": 1, "delta": {"content": "other"}, "finish_reason": "length"}]})
    found = await heard([choice_event({"content": "this"}), other, DONE])
    assert found[-1]["response"]["status"] == "completed"
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == "this"


async def test_an_engine_that_breaks_off_fails_the_response() -> None:
    source = ChatEvents(Spoken().events()[:3], BROKEN)
    found = await heard(source)
    assert kinds(found)[-1] == "failed"
    response = found[-1]["response"]
    assert response["error"] == {"code": "server_error", "message": "the original broke off"}
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "An answer."
    assert source.closed.is_set()


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        ([], "ended in the middle"),
        ([event({"error": {"message": "out of memory", "code": 500}}), DONE], "out of memory"),
        ([event({"error": "out of memory"}), DONE], "out of memory"),
        (["data: {broken\n\n"], "no JSON object"),
        (["data: []\n\n"], "no JSON object"),
    ],
)
async def test_a_stream_that_goes_wrong_fails_the_response(tail: list[str], message: str) -> None:
    found = await heard([choice_event({"content": "An "}), *tail])
    assert kinds(found)[-1] == "failed"
    assert message in found[-1]["response"]["error"]["message"]


async def test_what_is_no_data_is_passed_over() -> None:
    found = await heard([": ping\n\n", f"event: x\n{choice_event({'content': 'An'})}", DONE])
    assert found[-1]["response"]["output"][0]["content"][0]["text"] == "An"


async def test_half_of_a_surrogate_pair_is_passed_on() -> None:
    halves = [choice_event({"content": "\ud83d"}), choice_event({"content": "\ude00"}), DONE]
    lines = [line async for line in stream(ChatEvents(halves))]
    for line in lines:
        line.encode()
    assert json.loads(lines[-1].split("data: ")[1])["response"]["status"] == "completed"


async def test_each_event_goes_out_before_the_next_is_asked_for() -> None:
    source = ChatEvents(Spoken().events())
    events = stream(source)
    for _ in range(2):
        await anext(events)
    assert source.told == 0
    for _ in range(3):
        last = await anext(events)
    assert '"delta": "An "' in last
    assert source.told == 2


async def test_the_last_event_waits_for_the_end_of_the_chat_stream() -> None:
    source = ChatEvents(Spoken().events())
    async for line in stream(source):
        if line.startswith("event: response.completed"):
            assert source.over


async def test_closing_closes_the_chat_stream_also_before_it_began() -> None:
    for read in (0, 1, 5):
        source = ChatEvents(Spoken().events())
        events = stream(source)
        for _ in range(read):
            await anext(events)
        await events.aclose()
        assert source.closed.is_set()
        with pytest.raises(StopAsyncIteration):
            await anext(events)


async def test_cancelling_a_wait_leaves_the_stream_to_be_closed() -> None:
    source = ChatEvents(Spoken().events())
    source.go.clear()
    events = stream(source)

    async def read() -> None:
        async for _ in events:
            pass

    task = asyncio.create_task(read())
    await source.waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await events.aclose()
    assert source.closed.is_set()


WORDS = st.lists(st.text(min_size=1, max_size=5), max_size=4)
CALLS = st.lists(st.tuples(st.uuids().map(str), st.sampled_from("fg"), WORDS), max_size=3)


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    items = [{name: value for name, value in item.items() if name != "id"} for item in response["output"]]
    return {**response, "output": items, "created_at": 0, "completed_at": 0}


@given(WORDS, CALLS, WORDS, st.booleans(), st.sampled_from(["stop", "length"]))
def test_a_stream_ends_with_the_response_that_a_whole_reply_is(
    pieces: list[str],
    calls: list[tuple[str, str, list[str]]],
    thoughts: list[str],
    logprobs: bool,
    finish: str,
) -> None:
    spoken = Spoken(pieces, calls, thoughts, finish, logprobs)
    changes = LOGPROBS if logprobs else {}
    streamed = asyncio.run(heard(spoken, **changes))[-1]["response"]
    frame = Frame(parse({"input": "hello", "stream": True, **changes}), "resp_1", "soma", stored=True)
    assert without_ids(streamed) == without_ids(response_of(frame, spoken.completion()))
