"""Which routes are there, and in which shape they fail; on vLLM's own application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from support.api_services import SurfaceHouse

from soma_vllm.api.route_filter import KEPT, not_served

OURS = (
    "/ready",
    "/soma/adapters",
    "/soma/audit",
    "/soma/sessions",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/conversations",
    "/v1/messages",
    "/v1/models",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
    "/version",
)

GENERATING = (
    "/generative_scoring",
    "/inference/v1/generate",
    "/invocations",
    "/v1/chat/completions/batch",
    "/v1/messages/render",
    "/v1/responses/render",
    "/v1/systemone",
)

CHAT = {"model": "soma", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
async def services(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SurfaceHouse]:
    built = await SurfaceHouse.built(tmp_path_factory.mktemp("surface"))
    yield built
    await built.close()


def served(services: SurfaceHouse) -> set[str]:
    return {route.path for route in services.app.routes if getattr(route, "endpoint", None) is not not_served}


def calls(services: SurfaceHouse) -> int:
    return len(services.services.original.calls) + len(services.services.surrogate.calls)


async def test_what_is_open_is_ours_or_kept_by_name(services: SurfaceHouse) -> None:
    left = {path for path in served(services) if path != "/" and not path.startswith(OURS)}
    assert left == KEPT - {"/static"}  # which only soma-serve asks vLLM for
    assert not served(services) & set(GENERATING)


async def test_the_description_of_the_interface_tells_what_is_served(services: SurfaceHouse) -> None:
    told = (await services.send("GET", "/openapi.json")).json()["paths"]
    assert not set(told) & set(GENERATING)
    assert set(OURS) <= set(told)
    body = told["/v1/responses"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"input", "model", "previous_response_id"} <= body["properties"].keys()
    assert "$ref" not in str(body)


@pytest.mark.parametrize("path", GENERATING)
async def test_vllms_further_routes_are_closed_in_openais_shape(services: SurfaceHouse, path: str) -> None:
    before = calls(services)
    answer = await services.send("POST", path, json={**CHAT, "prompt": "x"})
    assert answer.status_code == HTTPStatus.NOT_FOUND
    assert "server.extra_routes" in answer.json()["error"]["message"]
    assert calls(services) == before


async def test_the_further_routes_are_there_where_they_are_asked_for(tmp_path: Path) -> None:
    services = await SurfaceHouse.built(tmp_path, server={"extra_routes": True})
    try:
        assert set(GENERATING) | set(OURS) <= served(services)
    finally:
        await services.close()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/nowhere", None, HTTPStatus.NOT_FOUND),
        ("POST", "/v1/embeddings", b"{}", HTTPStatus.NOT_FOUND),
        ("PUT", "/v1/chat/completions", b"{}", HTTPStatus.METHOD_NOT_ALLOWED),
        ("POST", "/v1/chat/completions", b"{", HTTPStatus.BAD_REQUEST),
        ("POST", "/v1/chat/completions", b"[" * 100_000, HTTPStatus.BAD_REQUEST),
        ("POST", "/v1/chat/completions", b'{"model": "\xff"}', HTTPStatus.BAD_REQUEST),
        ("POST", "/v1/chat/completions", b"", HTTPStatus.BAD_REQUEST),
        ("POST", "/v1/responses", b"[" * 100_000, HTTPStatus.BAD_REQUEST),
        ("POST", "/v1/responses/compact", b"{}", HTTPStatus.NOT_FOUND),
        ("GET", "/soma/sessions?limit=0", None, HTTPStatus.BAD_REQUEST),
    ],
)
async def test_whatever_fails_fails_in_openais_shape(
    services: SurfaceHouse, method: str, path: str, body: bytes | None, status: HTTPStatus
) -> None:
    answer = await services.send(method, path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert {"message", "type", "param", "code"} <= answer.json()["error"].keys()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": CHAT["messages"]}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/responses", {"input": "x"}),
    ],
)
async def test_a_request_names_its_model(services: SurfaceHouse, path: str, body: dict[str, Any]) -> None:
    answer = await services.send("POST", path, json=body)
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert answer.json()["error"]["param"] == "model"
    assert "expected one of soma" in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["soma", "large", "small"])
async def test_a_served_model_can_be_looked_up(services: SurfaceHouse, name: str) -> None:
    answer = await services.send("GET", f"/v1/models/{name}")
    assert answer.status_code == HTTPStatus.OK
    card = {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "soma_vllm"}
    assert answer.json() == card | {"max_model_len": 1024 if name == "small" else 2048}


@pytest.mark.parametrize("name", ["gpt-4", "adapter-s-1", "org/model", "..%2f..", "%00"])
async def test_no_other_model_can(services: SurfaceHouse, name: str) -> None:
    answer = await services.send("GET", f"/v1/models/{name}")
    assert answer.status_code == HTTPStatus.NOT_FOUND
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_half_a_surrogate_pair_is_refused_before_anybody_reads_it(services: SurfaceHouse) -> None:
    before = calls(services)
    said = {**CHAT, "messages": [{"role": "user", "content": "a\ud800b"}]}
    answer = await services.send("POST", "/v1/chat/completions", "half", json=said)
    assert answer.status_code == HTTPStatus.BAD_REQUEST
    assert answer.json()["error"]["param"] == "messages"
    assert calls(services) == before
    assert (await services.send("GET", "/soma/sessions", "half")).json()["data"] == []


async def test_a_whole_reply_has_no_nulls_but_those_of_openais_schema(services: SurfaceHouse) -> None:
    found = (await services.send("POST", "/v1/chat/completions", json=CHAT)).json()
    assert found["choices"][0]["logprobs"] is None
    assert None not in found.values()
    assert None not in found["choices"][0]["message"].values()
    assert None not in found["usage"].values()


@pytest.mark.parametrize("size", [257, 10_000_000])
async def test_an_id_that_is_too_long_is_a_400_wherever_it_stands(services: SurfaceHouse, size: int) -> None:
    name = "x" * size
    for asked in ({"headers": {"X-Session-ID": name}}, {"json": {**CHAT, "metadata": {"session_id": name}}}):
        answer = await services.send("POST", "/v1/chat/completions", **{"json": CHAT, **asked})
        assert answer.status_code == HTTPStatus.BAD_REQUEST
        assert answer.json()["error"]["param"] == "session_id"
        assert len(answer.text) < 1000


async def test_half_a_surrogate_pair_that_an_engine_says_reaches_the_client(services: SurfaceHouse) -> None:
    function = {"name": "look_up", "arguments": "caf\u00e9 \ud800"}
    services.services.original.calls_tools = [{"id": "call_1", "type": "function", "function": function}]
    try:
        answers = [
            await services.send("POST", "/v1/chat/completions", json={**CHAT, "model": "large"}),
            await services.send("POST", "/v1/chat/completions", "halves", json=CHAT),
        ]
    finally:
        services.services.original.calls_tools = []
    for answer in answers:
        assert answer.status_code == HTTPStatus.OK
        assert answer.json()["choices"][0]["message"]["tool_calls"][0]["function"] == function
    await services.settled()
    (listed,) = (await services.send("GET", "/soma/sessions", "halves")).json()["data"]
    assert listed["turns"] == 1
