"""Replies, the encoder's memory and what of a session may be seen."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from support.replies import read_events
from support.services import Services

from soma_vllm.adaptation.threaded_encoder import ThreadedEncoder
from soma_vllm.api.serializers import view
from soma_vllm.engines.reply_parser import Choice, parse_body
from soma_vllm.errors import ConfigError, NotFound
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.types import SessionKey, Usage


def test_a_stream_is_read_for_its_choices_and_its_usage() -> None:
    chunks = [
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"index": 1, "delta": {"content": "not this"}}]},
        {"choices": [{"index": 0, "delta": {"content": "he"}}]},
        {"choices": [{"index": 0, "delta": {"content": "llo"}, "finish_reason": "stop"}]},
        {
            "choices": [],
            "usage": {
                "prompt_tokens": 9,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 8},
            },
        },
    ]
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks] + ["data: [DONE]\n\n"]
    assert read_events(events) == ((Choice("hello"), Choice("not this")), Usage(9, 8, 2), True)
    assert read_events(events[:-1])[2] is False


def test_a_stream_with_an_error_in_it_did_not_come_to_its_own_end() -> None:
    events = ['data: {"choices": []}\n\n', 'data: {"error": {"type": "Boom"}}\n\n', "data: [DONE]\n\n"]
    assert read_events(events)[2] is False


def test_a_whole_reply_without_content_is_empty_text() -> None:
    reply = parse_body({"choices": [{"message": {"content": None}}]}, 0.0)
    assert reply.text == ""
    assert reply.usage == Usage()


async def test_the_encoder_is_asked_once_for_each_text() -> None:
    asked: list[list[str]] = []

    def encode(texts: Sequence[str]) -> NDArray[np.float32]:
        asked.append(list(texts))
        return np.asarray([[float(len(t))] for t in texts], dtype=np.float32)

    encoder = ThreadedEncoder(encode)
    assert (await encoder.encode(["a", "bb", "a"])).tolist() == [[1.0], [2.0], [1.0]]
    assert (await encoder.encode(["bb"])).tolist() == [[2.0]]
    assert asked == [["a", "bb"]]
    encoder.close()


async def test_a_view_of_a_session_holds_no_text(services: Services) -> None:
    history: list[dict[str, str]] = []
    for number in (1, 2, 3):
        await services.say(history, f"a pomegranate {number}")
    await services.settled()
    (key,) = {key for key, _ in services.events}
    shown = json.dumps(view(await services.registry.entry(key), True))
    assert "pomegranate" not in shown
    assert '"same"' not in shown


async def test_an_unknown_session_is_not_found_and_not_remembered(services: Services) -> None:
    key = SessionKey("t", "nobody")
    with pytest.raises(NotFound):
        await services.registry.entry(key)
    with pytest.raises(KeyError):
        services.registry.session(key)


def test_an_unknown_policy_is_told_with_the_known_ones(services: Services) -> None:
    config = services.config.model_copy(update={"policy": "dice"})
    with pytest.raises(ConfigError, match=r"found 'dice'; expected one of .*original, routellm, soma"):
        Policies(config)
