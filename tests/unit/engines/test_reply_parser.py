"""A reply that an endpoint streams in a form of its own costs its turn, and nothing that the turn held."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator

import pytest

from soma_vllm.engines.engine import Reply
from soma_vllm.engines.reply_parser import Choice, ParsedReply, observe, read_events
from soma_vllm.types import Usage

STRANGE = [
    {"choices": [{"index": 0, "delta": {"content": [{"type": "text", "text": "parts"}]}}]},
    {"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": ["no object"]},
    {"choices": ["no object"]},
]


@pytest.mark.parametrize("chunk", STRANGE)
async def test_a_stream_that_cannot_be_read_still_ends_once(chunk: object) -> None:
    async def events() -> AsyncGenerator[str, None]:
        yield f"data: {json.dumps(chunk)}\n\n"
        yield "data: [DONE]\n\n"

    ended: list[ParsedReply] = []

    async def on_end(reply: ParsedReply) -> None:
        ended.append(reply)

    reply = await observe(Reply(events=events()), 0.0, on_end)
    assert reply.events is not None
    assert len([event async for event in reply.events]) == 2
    (parsed,) = ended
    assert (parsed.complete, parsed.silent) == (False, True)


def test_blanks_around_an_event_s_data_mean_nothing() -> None:
    events = ['data:  {"choices": [{"index": 0, "delta": {"content": "hello"}}]}\n\n', "data: [DONE] \n\n"]
    assert read_events(events) == ((Choice("hello"),), Usage(), True)
