"""What clients and people rely on beside the dispatch, on vLLM's own application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from support.api_services import ADMIN, SurfaceHouse

from soma_vllm.api.error_responses import failed
from soma_vllm.config import Limits
from soma_vllm.errors import EngineRefused

PAGE = {"Origin": "http://localhost:3000"}
CHAT = {"model": "soma", "messages": [{"role": "user", "content": "hello"}]}
HALF = "a\ud800b"
TOOL = {"name": "look_up", "input_schema": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SurfaceHouse]:
    built = await SurfaceHouse.built(tmp_path_factory.mktemp("surface"))
    yield built
    await built.close()


@pytest.fixture(scope="module")
async def keyed(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SurfaceHouse]:
    built = await SurfaceHouse.built(tmp_path_factory.mktemp("keyed"), access={"mode": "keys"})
    yield built
    await built.close()


# -- pages and paths --------------------------------------------------------------------------------------


async def test_a_person_finds_a_page_and_a_client_with_a_wrong_base_url_an_error(
    services: SurfaceHouse,
) -> None:
    page = await services.send("GET", "/", key=None)
    assert page.status_code == HTTPStatus.OK
    assert "http://soma/v1" in page.text
    assert "<script" not in page.text
    refused = await services.send("GET", "/")
    assert refused.status_code == HTTPStatus.NOT_FOUND
    assert "/v1" in refused.json()["error"]["message"]


async def test_the_server_says_what_it_is(services: SurfaceHouse) -> None:
    told = (await services.send("GET", "/openapi.json")).json()["info"]
    assert told["title"] == "soma-serve"
    assert (await services.send("GET", "/version")).json().keys() == {"version", "soma_vllm"}


@pytest.mark.parametrize(
    "path", ["/chat/completions", "/models", "/nothing/here", "/v1/nothing", "/collective_rpc"]
)
@pytest.mark.parametrize("known", [True, False])
async def test_a_path_that_is_not_there_is_a_404_with_and_without_a_key(
    keyed: SurfaceHouse, path: str, known: bool
) -> None:
    key = (await keyed._keys.add("Ana", Limits()))[1] if known else None
    for sent in (key, ADMIN):
        answer = await keyed.send("POST", path, sent, json={})
        assert answer.status_code == HTTPStatus.NOT_FOUND
    assert (await keyed.send("GET", "/v1/models", None)).status_code == HTTPStatus.UNAUTHORIZED
    refused = await keyed.send("PUT", "/v1/chat/completions", ADMIN, json={})
    assert refused.status_code == HTTPStatus.METHOD_NOT_ALLOWED


# -- browsers ---------------------------------------------------------------------------------------------


async def test_a_local_page_may_ask_and_reads_who_answered(keyed: SurfaceHouse) -> None:
    wish = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,x-session-id",
    }
    answer = await keyed.send("OPTIONS", "/v1/chat/completions", None, headers={**PAGE, **wish})
    assert answer.status_code == HTTPStatus.OK
    assert answer.headers["access-control-allow-origin"] == PAGE["Origin"]
    refused = await keyed.send("GET", "/v1/models", None, headers=PAGE)
    assert refused.status_code == HTTPStatus.UNAUTHORIZED
    assert "X-SOMA-Session" in refused.headers["access-control-expose-headers"]
    assert len(refused.headers.get_list("x-request-id")) == 1
    other = await keyed.send(
        "GET", "/v1/models", None, headers={"Origin": "http://localhost:3000.evil.example"}
    )
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        (["https://chat.example.org"], "https://chat.example.org", True),
        (["https://chat.example.org"], "https://chatXexample.org", False),
        (["https://*.example.org"], "https://a.example.org", True),
        (["*"], "https://anything.example", True),
        ([], "http://localhost:3000", False),
    ],
)
async def test_the_configured_pages_may_ask(
    tmp_path: Path, origins: list[str], origin: str, allowed: bool
) -> None:
    built = await SurfaceHouse.built(tmp_path, server={"cors": {"allow_origins": origins, "max_age_s": 7}})
    try:
        wish = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        answer = await built.send("OPTIONS", "/v1/chat/completions", None, headers=wish)
        assert ("access-control-allow-origin" in answer.headers) is allowed
        assert answer.headers.get("access-control-max-age") == ("7" if origins else None)
    finally:
        await built.close()


async def test_a_stream_that_waits_is_kept_open_as_configured(tmp_path: Path) -> None:
    built = await SurfaceHouse.built(tmp_path, server={"keep_alive_s": 0.02})
    original = built.services.original
    try:
        original.go.clear()
        asyncio.get_running_loop().call_later(0.2, original.go.set)
        answer = await built.send("POST", "/v1/chat/completions", json={**CHAT, "stream": True})
        assert answer.text.startswith(": keep-alive\n\n")
        assert answer.text.endswith("data: [DONE]\n\n")
        assert answer.headers["x-soma-reason"] == "warm start 1 of 2"
        original.go.clear()
        asyncio.get_running_loop().call_later(0.2, original.go.set)
        response = {"model": "soma", "input": "hello", "stream": True}
        answer = await built.send("POST", "/v1/responses", json=response)
        assert ": keep-alive\n\nevent: response.created\n" in answer.text
    finally:
        await built.close()


# -- bodies and headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "added",
    [
        {"stop": [HALF]},
        {"bad_words": [HALF]},
        {"request_id": HALF},
        {"vllm_xargs": {"a": HALF}},
        {"metadata": {HALF: "a"}},
        {"tools": [{"type": "function", "function": {"name": HALF}}]},
        {"user": HALF},
        {HALF: 1},
    ],
)
@pytest.mark.parametrize("model", ["soma", "large", "small"])
async def test_text_that_is_no_unicode_is_refused_wherever_it_stands(
    services: SurfaceHouse, model: str, added: dict[str, Any]
) -> None:
    for path, asked in (
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": CHAT["messages"], "max_tokens": 4}),
        ("/tokenize", {"prompt": "x"}),
    ):
        answer = await services.send("POST", path, json={**asked, "model": model, **added})
        assert answer.status_code == HTTPStatus.BAD_REQUEST, path
    created = await services.send("POST", "/v1/conversations", json={"metadata": {"a": HALF}})
    assert created.status_code == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize(("value", "stream"), [("false", False), ("off", False), (0, False), ("true", True)])
async def test_stream_is_read_as_vllm_reads_it(services: SurfaceHouse, value: Any, stream: bool) -> None:
    answer = await services.send("POST", "/v1/chat/completions", json={**CHAT, "stream": value})
    assert answer.status_code == HTTPStatus.OK
    assert answer.headers["content-type"].startswith("text/event-stream" if stream else "application/json")
    assert services.services.original.calls[-1].body["stream"] is stream


@pytest.mark.parametrize(
    ("header", "value"),
    [("X-SOMA", "foo"), ("X-SOMA-Polcy", "original"), ("X-SOMA-Force", "sometimes"), ("X-SOMA-Policy", "none")],
)
async def test_a_header_that_would_be_ignored_is_refused(
    services: SurfaceHouse, header: str, value: str
) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/responses", {"model": "soma", "input": "x"})):
        answer = await services.send("POST", path, json=body, headers={header: value})
        assert answer.status_code == HTTPStatus.BAD_REQUEST
        assert value in answer.json()["error"]["message"] or "header" in answer.json()["error"]["message"]


async def test_a_replys_own_headers_may_be_sent_back(services: SurfaceHouse) -> None:
    answer = await services.send(
        "POST", "/v1/chat/completions", json=CHAT, headers={"X-SOMA-Engine": "original"}
    )
    assert answer.status_code == HTTPStatus.OK


@pytest.mark.parametrize(
    "told",
    [
        "This model's maximum context length is 4096 tokens. However, you requested 5000",
        "The decoder prompt (length 9) is longer than the maximum model length of 8.",
    ],
)
def test_a_prompt_that_is_too_long_has_openais_code(told: str) -> None:
    def code(message: str, code: int | str) -> Any:
        body = {"error": {"message": message, "type": "BadRequestError", "param": None, "code": code}}
        return failed(EngineRefused(400, body)).body

    assert b'"code":"context_length_exceeded"' in code(told, 400)
    assert b'"code":"own"' in code(told, "own")
    assert b'"code":400' in code("temperature: found 9", 400)


# -- models and tokens ------------------------------------------------------------------------------------


async def test_every_card_has_its_length_and_every_reply_the_same_model(services: SurfaceHouse) -> None:
    cards = (await services.send("GET", "/v1/models")).json()["data"]
    assert {card["id"]: card["max_model_len"] for card in cards} == {"soma": 2048, "large": 2048, "small": 1024}
    assert all(card["created"] > 0 for card in cards)
    chat = await services.send("POST", "/v1/chat/completions", "m", json=CHAT)
    answer = await services.send("POST", "/v1/responses", "m", json={"model": "soma", "input": "hello"})
    assert chat.json()["model"] == answer.json()["model"] == "large"


@pytest.mark.parametrize("asked", [{"prompt": "x"}, {"messages": CHAT["messages"]}])
async def test_the_originals_tokenizer_answers_under_its_names(
    services: SurfaceHouse, asked: dict[str, Any]
) -> None:
    for model in ("soma", "large"):
        answer = await services.send("POST", "/tokenize", json={"model": model, **asked})
        assert answer.json()["tokens"] == [1, 2, 3]
    text = await services.send("POST", "/detokenize", json={"model": "large", "tokens": [1]})
    assert text.status_code == HTTPStatus.OK
    unknown = await services.send("POST", "/tokenize", json={"model": "gpt", **asked})
    assert unknown.status_code == HTTPStatus.NOT_FOUND


# -- Anthropic's shape ------------------------------------------------------------------------------------


@pytest.fixture
async def claude(services: SurfaceHouse) -> AsyncIterator[anthropic.AsyncAnthropic]:
    transport = httpx2.ASGITransport(services.app)
    client = httpx2.AsyncClient(transport=transport)
    async with anthropic.AsyncAnthropic(
        api_key="claude", base_url="http://soma", http_client=client, max_retries=0
    ) as found:
        yield found


@pytest.mark.parametrize("streamed", [False, True])
async def test_messages_are_turns_of_one_session_of_their_own_key(
    services: SurfaceHouse, claude: anthropic.AsyncAnthropic, streamed: bool
) -> None:
    history: list[Any] = []
    for turn in range(2):
        history.append({"role": "user", "content": f"question {turn} {streamed}"})
        asked: dict[str, Any] = {"model": "soma", "max_tokens": 8, "system": "be brief", "messages": history}
        if streamed:
            async with claude.messages.stream(**asked) as stream:
                message = await stream.get_final_message()
        else:
            message = await claude.messages.create(**asked)
        assert message.content[0].type == "text"
        assert message.stop_reason == "end_turn"
        assert message.model == "large"
        history.append({"role": "assistant", "content": message.content[0].text})
    await services.settled()
    listed = (await services.send("GET", "/soma/sessions", "claude")).json()["data"]
    assert [session["turns"] for session in listed] == [2] * (1 + streamed)


async def test_a_message_may_call_a_tool_and_be_given_its_result(
    services: SurfaceHouse, claude: anthropic.AsyncAnthropic
) -> None:
    function = {"name": "look_up", "arguments": '{"a": 1}'}
    services.services.original.calls_tools = [{"id": "call_1", "type": "function", "function": function}]
    asked: dict[str, Any] = {"model": "soma", "max_tokens": 8, "tools": [TOOL]}
    try:
        message = await claude.messages.create(**asked, messages=[{"role": "user", "content": "tool?"}])
    finally:
        services.services.original.calls_tools = []
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (call.name, call.input) == ("look_up", {"a": 1})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "found"}
    history: list[Any] = [
        {"role": "user", "content": "tool?"},
        {"role": "assistant", "content": [call.model_dump()]},
        {"role": "user", "content": [result]},
    ]
    await claude.messages.create(**asked, messages=history)
    roles = [message["role"] for message in services.services.original.calls[-1].body["messages"]]
    assert roles == ["user", "assistant", "tool"]


async def test_a_message_that_is_wrong_is_refused_in_anthropics_shape(
    services: SurfaceHouse, claude: anthropic.AsyncAnthropic
) -> None:
    with pytest.raises(anthropic.NotFoundError) as caught:
        await claude.messages.create(
            model="claude-x", max_tokens=8, messages=[{"role": "user", "content": "x"}]
        )
    assert caught.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    counted = await claude.messages.count_tokens(model="soma", messages=[{"role": "user", "content": "x"}])
    assert counted.input_tokens == 3
