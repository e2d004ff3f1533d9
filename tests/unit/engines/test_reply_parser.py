"""What is heard of a reply never breaks what the client hears, whatever an endpoint writes."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncGenerator, Iterable
from typing import Any

import pytest
from support.replies import read_events

from soma_vllm.engines.engine import Reply
from soma_vllm.engines.reply_parser import (
    Choice,
    HeardWords,
    ParsedReply,
    observe,
    observe_stream,
    parse_body,
)
from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.types import Usage

STRANGE: list[object] = [
    {"choices": ["no object"]},
    {"choices": {"index": 0}},
    {"choices": [{"index": 0, "delta": "no object"}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": "none"}}]},
    {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": {"a": 1}}}, 3]}}]},
    {"error": "it broke"},
]
COUNTS = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}
WORDS = {"choices": [{"index": 0, "delta": {"content": "hello"}}], "usage": None}


def sent(*chunks: object) -> list[str]:
    return [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]


async def heard(events: Iterable[str], hide_usage: bool = False) -> tuple[list[str], ParsedReply]:
    """(what the client gets of these events, what was heard of them)."""

    async def stream() -> AsyncGenerator[str, None]:
        for event in events:
            yield event

    ended: list[ParsedReply] = []

    async def on_end(reply: ParsedReply) -> None:
        ended.append(reply)

    reply = await observe(Reply(events=stream()), 0.0, on_end, hide_usage)
    assert reply.events is not None
    got = [event async for event in reply.events]
    (parsed,) = ended
    return got, parsed


@pytest.mark.parametrize("chunk", STRANGE, ids=str)
async def test_a_stream_that_cannot_be_read_passes_and_is_incomplete(chunk: object) -> None:
    events = sent(chunk)
    got, parsed = await heard(events)
    assert got == events
    assert not parsed.complete


async def test_streams_that_find_no_room_pass_whole_and_are_heard_in_part() -> None:
    words = HeardWords(0)
    words._most = 5
    replies: list[ParsedReply] = []

    async def ended(reply: ParsedReply) -> None:
        replies.append(reply)

    def stream(*said: str) -> StreamTap:
        async def pieces() -> AsyncGenerator[str, None]:
            for word in said:
                yield f'data: {{"choices": [{{"index": 0, "delta": {{"content": "{word}"}}}}]}}\n\n'
            yield "data: [DONE]\n\n"

        return observe_stream(pieces(), 0.0, ended, heard=words)

    first = stream("four")
    assert len([await anext(first)]) == 1
    passed = [event async for event in stream("two", "three")]
    assert len(passed) == 3
    assert (replies[0].text, replies[0].complete) == ("", False)
    await first.aclose()
    assert words.characters == 0
    assert [event async for event in stream("two")]
    assert (replies[-1].text, replies[-1].complete, words.characters) == ("two", True, 0)


async def test_content_in_parts_and_arguments_as_objects_are_read() -> None:
    call = {"index": 0, "id": "c", "function": {"name": "f", "arguments": {"a": 1}}}
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
        {"type": "text", "text": "So"},
    ]
    delta = {"content": parts, "tool_calls": [call]}
    _, parsed = await heard(sent({"choices": [{"index": 0, "delta": delta}]}))
    (choice,) = parsed.choices
    assert (choice.text, parsed.complete) == ("So", True)
    assert choice.calls[0]["function"]["arguments"] == '{"a":1}'


async def test_counts_of_tokens_may_be_text_and_nothing_else_counts() -> None:
    usage = {"prompt_tokens": "5", "completion_tokens": -1, "prompt_tokens_details": "none"}
    _, parsed = await heard(sent({"choices": [], "usage": usage}))
    assert parsed.usage == Usage(5, None, None)
    body: dict[str, Any] = {"choices": [{"message": {"content": "x"}}], "usage": usage}
    assert parse_body(body, 0.0).usage == Usage(5, None, None)
    assert not parse_body({"choices": ["no object"]}, 0.0).complete


async def test_a_count_that_the_client_did_not_ask_for_is_heard_and_taken_off() -> None:
    got, parsed = await heard(sent(WORDS, COUNTS), hide_usage=True)
    del WORDS["usage"]
    assert got == sent(WORDS)
    assert parsed.usage == Usage(5, None, 2)
    got, _ = await heard(sent(WORDS, COUNTS))
    assert got == sent(WORDS, COUNTS)


async def test_a_stream_without_a_count_has_at_least_as_many_tokens_as_pieces() -> None:
    _, parsed = await heard([*sent(WORDS, WORDS, WORDS)[:-1]])
    assert (parsed.complete, parsed.usage, parsed.at_least) == (False, Usage(), 3)


async def test_what_fails_at_the_end_of_a_reply_is_not_the_clients_affair() -> None:
    async def fails(reply: ParsedReply) -> None:
        raise RuntimeError("an observer broke")

    body = {"choices": [{"message": {"content": "hello"}}]}
    assert (await observe(Reply(body=body), 0.0, fails)).body == body


async def test_no_stream_of_bytes_breaks_the_listener() -> None:
    """Events out of fragments of JSON and of the event stream's syntax, in any order."""
    words = [
        "null",
        "1e999",
        '"\\ud800"',
        "9" * 5000,
        "[DONE]",
        '"usage":',
        '"error":',
        '"content":',
        '"delta":',
    ]
    syntax = ["[", "]", "{", "}", ":", ",", " ", "data:", "event: x\n", "\n", "\n\n", "\r", "\ufeff"]
    fragments = ['{"choices":', *words, *syntax]
    random_ = random.Random(17)
    for _ in range(2000):
        events = ["data: " + "".join(random_.choices(fragments, k=random_.randint(0, 12))) for _ in range(3)]
        got, _ = await heard(events)
        assert got == events


def test_blanks_around_an_event_s_data_mean_nothing() -> None:
    events = ['data:  {"choices": [{"index": 0, "delta": {"content": "hello"}}]}\n\n', "data: [DONE] \n\n"]
    assert read_events(events) == ((Choice("hello"),), Usage(), True)
