"""`X-Request-Id`: accepted, made, repeated, and bound for log lines."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.responses import PlainTextResponse, StreamingResponse

from soma_vllm import logs
from soma_vllm.api.auth.access import AccessControl
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.api.request_id import RequestId
from soma_vllm.config import Access, Limits
from soma_vllm.sessions.state.identity import tenant_of

GENERATED = re.compile(r"[0-9a-f]{32}")


@pytest.fixture
def client() -> httpx.AsyncClient:
    app = FastAPI()

    @app.get("/v1/ids")
    async def ids() -> PlainTextResponse:
        return PlainTextResponse(
            f"{logs.request_id.get()} {logs.tenant.get()}", headers={"x-request-id": "own"}
        )

    @app.get("/v1/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> AsyncIterator[str]:
            for _ in range(2):
                yield f"{logs.request_id.get()} "

        return StreamingResponse(pieces())

    app.add_middleware(AccessControl, quotas=Quotas(Access(), Limits(), registry=CollectorRegistry()))
    app.add_middleware(RequestId)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://soma")


@pytest.mark.parametrize("given", ["r-1", "a b", "x" * 128, '{"a": 1}'])
async def test_a_clients_own_id_is_kept_and_repeated_once(client: httpx.AsyncClient, given: str) -> None:
    got = await client.get("/v1/ids", headers={"X-Request-Id": given})
    assert got.headers.get_list("x-request-id") == [given]
    assert got.text == f"{given} {tenant_of(None)}"
    assert logs.request_id.get() is None


@pytest.mark.parametrize(
    "given", [[], [""], [" "], ["x" * 129], ["caf\u00e9".encode()], [b"a\tb"], [b"a\x1bb"], ["a", "b"]]
)
async def test_any_other_id_is_replaced(client: httpx.AsyncClient, given: list[str | bytes]) -> None:
    headers = [("X-Request-Id", value) for value in given]
    first, second = [await client.get("/v1/ids", headers=headers) for _ in range(2)]  # type: ignore[arg-type]
    assert GENERATED.fullmatch(first.headers["x-request-id"])
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.text.split()[0] == first.headers["x-request-id"]


async def test_a_stream_is_sent_under_the_id(client: httpx.AsyncClient) -> None:
    got = await client.get("/v1/stream", headers={"X-Request-Id": "r"})
    assert (got.text, got.headers["x-request-id"]) == ("r r ", "r")


@pytest.mark.parametrize(
    ("path", "authorization", "status"), [("/none", "Bearer k", 404), ("/v1/ids", "Basic k", 401)]
)
async def test_a_refusal_has_the_id_too(
    client: httpx.AsyncClient, path: str, authorization: str, status: int
) -> None:
    got = await client.get(path, headers={"X-Request-Id": "r", "Authorization": authorization})
    assert (got.status_code, got.headers["x-request-id"]) == (status, "r")


async def test_log_lines_name_the_tenant_of_the_caller(client: httpx.AsyncClient) -> None:
    got = await client.get("/v1/ids", headers={"Authorization": "Bearer k"})
    assert got.text.split()[1] == tenant_of("Bearer k")
    assert logs.tenant.get() is None
