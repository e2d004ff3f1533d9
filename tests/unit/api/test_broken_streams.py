"""How a stream ends for its client, and how flags and numbers of a body are read."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from pydantic import BaseModel

from soma_vllm.api.chat import as_validated
from soma_vllm.api.dialogue_stream import DialogueStream
from soma_vllm.api.error_responses import failed
from soma_vllm.errors import EngineRefused, EngineUnavailable


async def sent(failure: Exception | None) -> tuple[str, bool]:
    """(the body that a client gets of a stream, whether it came to a clean end)."""

    async def events() -> AsyncGenerator[str, None]:
        yield "data: {}\n\n"
        if failure is not None:
            raise failure
        yield "data: [DONE]\n\n"

    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
    await DialogueStream(events(), {})(scope, receive, send)
    body = b"".join(message.get("body", b"") for message in messages).decode()
    return body, not messages[-1].get("more_body", False)


async def test_a_whole_stream_passes_as_it_is() -> None:
    assert await sent(None) == ("data: {}\n\ndata: [DONE]\n\n", True)


@pytest.mark.parametrize(
    ("failure", "message"),
    [(EngineUnavailable("it broke off"), "it broke off"), (RuntimeError("what was said"), "RuntimeError")],
    ids=str,
)
async def test_a_stream_that_breaks_ends_with_an_error_and_is_closed(failure: Exception, message: str) -> None:
    body, clean = await sent(failure)
    first, last, rest = body.split("\n\n")
    assert (first, rest, clean) == ("data: {}", "", True)
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] == message


def test_the_wait_that_an_engine_asks_for_goes_out() -> None:
    def told(error: Exception) -> str | None:
        return failed(error).headers.get("Retry-After")  # type: ignore[arg-type]

    assert told(EngineRefused(429, {}, retry_after=7)) == "7"
    assert told(EngineRefused(429, {})) == "5"
    assert told(EngineRefused(400, {})) is None
    assert told(EngineUnavailable("x", retry_after=float("inf"))) == "86400"


class Options(BaseModel):
    include_usage: bool | None = None


class Body(BaseModel):
    stream: bool | None = False
    n: int | None = 1
    temperature: float | None = None
    stop: str | list[str] | None = None
    stream_options: Options | None = None


@pytest.mark.parametrize("value", ["false", "False", "off", "no", "n", "f", "0", 0, False])
def test_a_flag_is_what_vllm_reads(value: object) -> None:
    given = {"stream": value, "n": "2", "temperature": "0.5", "stop": "1", "other": "false"}
    found = as_validated(given, Body.model_validate(given))
    assert found == {"stream": False, "n": 2, "temperature": 0.5, "stop": "1", "other": "false"}
    assert found["stream"] is False


def test_flags_are_read_at_every_depth_and_what_is_right_stays() -> None:
    given = {"stream": True, "temperature": 0, "stop": None, "stream_options": {"include_usage": "yes", "x": 1}}
    found = as_validated(given, Body.model_validate(given))
    assert found == {**given, "stream_options": {"include_usage": True, "x": 1}}
    assert isinstance(found["temperature"], int)
