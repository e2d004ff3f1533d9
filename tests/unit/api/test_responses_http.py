"""`/v1/responses` over HTTP: headers, errors, a client that leaves, and every route that vLLM has."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from support.guard import GUARD_S
from support.responses_services import (
    BROKEN,
    HEADERS,
    ChatEvents,
    Script,
    Spoken,
    application,
    checked,
    http_client,
    openai_client,
    told,
)
from vllm.entrypoints.openai.responses import api_router as vllm_responses

from soma_vllm.api.responses import routes as responses
from soma_vllm.errors import BadRequest, EngineRefused, NoSuchModel, StoreUnavailable, Unprocessable


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def client(script: Script) -> AsyncOpenAI:
    return openai_client(script)


@pytest.mark.parametrize("streamed", [False, True])
async def test_who_answered_and_why_stands_in_the_headers(script: Script, streamed: bool) -> None:
    async with http_client(script) as http:
        got = await http.post("/responses", json={"input": "x", "stream": streamed})
    assert got.status_code == 200
    assert {name: got.headers[name] for name in HEADERS} == HEADERS
    kind = "text/event-stream" if streamed else "application/json"
    assert got.headers["content-type"].startswith(kind)


async def test_a_stream_is_openais_events_and_nothing_else(script: Script) -> None:
    async with http_client(script) as http:
        got = await http.post("/responses", json={"input": "x", "stream": True})
    lines = [f"{block}\n\n" for block in got.text.split("\n\n") if block]
    assert told(lines)[-1]["type"] == "response.completed"


async def test_a_whole_response_passes_openais_own_types(script: Script) -> None:
    async with http_client(script) as http:
        got = await http.post("/responses", json={"input": "x", "metadata": {"session_id": "m"}})
    assert checked(got.json()).metadata == {"session_id": "m"}
    assert script.body["metadata"] == {"session_id": "m"}
    assert script.body.get("model") is None
    assert got.json()["model"] == "soma"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadRequest("messages: too many", "messages"), 400),
        (NoSuchModel("model: found 'x'", "model"), 404),
        (BROKEN, 503),
        (StoreUnavailable("away"), 503),
    ],
)
async def test_an_error_has_openais_shape(script: Script, error: Any, status: int) -> None:
    for streamed in (False, True):
        script.answers = [error]
        async with http_client(script) as http:
            got = await http.post("/responses", json={"input": "x", "stream": streamed})
        assert got.status_code == status
        shown = got.json()["error"]
        assert set(shown) == {"message", "type", "param", "code"}
        assert shown["message"] == str(error)
        assert status != 503 or math.isfinite(float(got.headers["retry-after"]))


async def test_an_engines_own_refusal_goes_out_unchanged(script: Script, client: AsyncOpenAI) -> None:
    script.answers = [EngineRefused(400, {"error": {"message": "too long", "param": "messages"}})]
    with pytest.raises(openai.BadRequestError, match="too long"):
        await client.responses.create(model="soma", input="x")


async def test_a_dialogue_whose_text_was_not_kept_cannot_be_gone_on_from(
    script: Script, client: AsyncOpenAI
) -> None:
    script.unreadable = Unprocessable("its text was not kept")
    with pytest.raises(openai.UnprocessableEntityError):
        await client.responses.create(model="soma", input="x", previous_response_id="resp_1")


async def test_what_is_not_served_is_refused_before_anybody_is_asked(
    script: Script, client: AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="soma", input="x", tools=[{"type": "web_search"}])
    assert caught.value.param == "tools[0].type"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="soma", input="x", background=True, store=False)
    assert caught.value.param == "background"
    assert not script.asked


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"input": NaN}', b"\xff", b"[" * 100_000, b'{"input": "x"} x'],
)
async def test_a_body_that_is_no_json_object_is_refused(script: Script, content: bytes) -> None:
    async with http_client(script) as http:
        got = await http.post("/responses", content=content, headers={"content-type": "application/json"})
    assert got.status_code == 400
    assert "JSON" in got.json()["error"]["message"]


async def test_half_a_surrogate_pair_of_a_client_is_refused_and_an_engines_is_passed_on(script: Script) -> None:
    script.answers = [Spoken(("\ud83d",))]
    schema = '{"type": "object", "description": "\\ud83d"}'
    tool = f'{{"type": "function", "name": "f", "parameters": {schema}}}'
    async with http_client(script) as http:
        for content in ('{"input": "\\ud83d"}', f'{{"input": "x", "tools": [{tool}]}}'):
            got = await http.post("/responses", content=content, headers={"content-type": "application/json"})
            assert got.status_code == HTTPStatus.BAD_REQUEST
            assert "surrogate pair" in got.json()["error"]["message"]
        got = await http.post("/responses", json={"input": "x"})
    assert got.status_code == HTTPStatus.OK
    assert got.json()["output"][0]["content"][0]["text"] == "\ud83d"


async def test_the_engines_failure_to_answer_is_a_bad_gateway(script: Script) -> None:
    class Empty(Spoken):
        def completion(self) -> dict[str, Any]:
            return {"object": "chat.completion", "choices": []}

    script.answers = [Empty()]
    async with http_client(script) as http:
        got = await http.post("/responses", json={"input": "x"})
    assert got.status_code == HTTPStatus.BAD_GATEWAY


# -- a client that leaves ---------------------------------------------------------------------------------

Messages = list[MutableMapping[str, Any]]


async def call(
    script: Script, body: dict[str, Any], receive: Callable[[], Awaitable[MutableMapping[str, Any]]]
) -> Messages:
    """One request as a server makes it; `receive` goes on after the body. Returns what was sent."""
    sent: Messages = []
    first: Messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receiving() -> MutableMapping[str, Any]:
        return first.pop() if first else await receive()

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/responses",
        "raw_path": b"/v1/responses",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("c", 1),
        "server": ("s", 80),
    }
    await asyncio.wait_for(application(script)(scope, receiving, send), GUARD_S)
    return sent


async def test_a_client_that_leaves_ends_the_chat_stream_at_once(script: Script) -> None:
    source = ChatEvents(Spoken().events())
    source.go.clear()
    script.answers = [source]

    async def leave() -> MutableMapping[str, Any]:
        await source.waiting.wait()
        return {"type": "http.disconnect"}

    sent = await call(script, {"input": "x", "stream": True}, leave)
    assert source.closed.is_set()
    assert source.told == 0
    assert b"response.created" in sent[1]["body"]


async def test_a_client_that_left_before_the_stream_began_ends_it_too(script: Script) -> None:
    source = ChatEvents(Spoken().events())

    class Slow(Script):
        async def chat(self, incoming: Any) -> Any:
            answer = await super().chat(incoming)
            gone.set()
            return answer

    gone = asyncio.Event()
    slow = Slow(answers=[source])

    async def leave() -> MutableMapping[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    await call(slow, {"input": "x", "stream": True}, leave)
    assert source.closed.is_set()


async def test_a_client_that_leaves_a_whole_reply_cancels_the_chat() -> None:
    asked, cancelled = asyncio.Event(), asyncio.Event()

    class Waiting(Script):
        async def chat(self, incoming: Any) -> Any:
            asked.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

    async def leave() -> MutableMapping[str, Any]:
        await asked.wait()
        return {"type": "http.disconnect"}

    await call(Waiting(), {"input": "x"}, leave)
    await asyncio.wait_for(cancelled.wait(), GUARD_S)


# -- vLLM's own -------------------------------------------------------------------------------------------


def test_every_route_that_vllm_has_for_responses_is_one_of_ours() -> None:
    def operations(routes: Any) -> set[tuple[str, str]]:
        return {(method, route.path) for route in routes for method in route.methods}

    assert operations(vllm_responses.router.routes) <= operations(responses.router.routes)
