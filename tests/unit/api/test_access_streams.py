"""What passes through the middleware: streams, leaving clients, other protocols; behind real uvicorn too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from support.access_app import (
    CHAT,
    MIB,
    nothing,
    nothing_sent,
    scope_of,
    services,
)
from support.guard import GUARD_S

from soma_vllm.api.auth.access import AccessControl
from soma_vllm.sessions.sql.api_keys import KeyStore

# -- what passes through --------------------------------------------------------------------------------


async def test_a_stream_arrives_piece_by_piece() -> None:
    sent: list[bytes] = []
    seen_after: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": bytes([number]), "more_body": True})
            seen_after.append(len(sent))
        await send({"type": "http.response.body", "body": b""})

    async def keep(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message["body"])

    gate = AccessControl(app, services().quotas)
    await gate(scope_of(CHAT, []), nothing, keep)
    assert seen_after == [1, 2, 3]


async def test_a_client_that_leaves_is_seen_by_the_application() -> None:
    built = services()
    messages = [{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def ignore(message: Any) -> None: ...

    await asyncio.wait_for(built.app(scope_of("/v1/waits", []), receive, ignore), GUARD_S)
    assert built.disconnected.is_set()


async def test_a_client_that_leaves_mid_body_is_not_taken_for_a_refusal() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        raise ClientDisconnect

    built = services()
    messages = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    with pytest.raises(ClientDisconnect):
        await AccessControl(app, built.quotas)(scope_of(CHAT, []), receive, nothing_sent)
    assert built.counted("body") == 0


async def test_the_start_and_end_of_the_server_pass_through(keys: KeyStore) -> None:
    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    await AccessControl(app, services(keys=keys).quotas)({"type": "lifespan"}, nothing, nothing_sent)
    assert seen == ["lifespan"]


async def test_a_web_socket_without_a_key_is_closed_before_it_opens(keys: KeyStore) -> None:
    built = services(keys=keys)
    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message)

    scope = {**scope_of("/v1/realtime", []), "type": "websocket"}
    del scope["method"]
    await AccessControl(built.app, built.quotas)(scope, nothing, keep)
    assert sent == [{"type": "websocket.close", "code": 1008}]


# -- a real server --------------------------------------------------------------------------------------


@asynccontextmanager
async def served(app: FastAPI, http: str) -> AsyncIterator[int]:
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, http=http, log_level="error", lifespan="off")
    )
    server.install_signal_handlers = lambda: None
    running = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        await running


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_a_client_that_is_still_sending_gets_its_413(http: str) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield b"x" * (MIB // 8)
            await asyncio.sleep(0)

    built = services()
    async with served(built.app, http) as port, httpx.AsyncClient() as client:
        url = f"http://127.0.0.1:{port}{CHAT}"
        streamed = await client.post(url, content=endless())
        declared = await client.post(url, content=b"x" * (4 * MIB))
        after = await client.post(url, json={"text": "abc"})
    assert (streamed.status_code, declared.status_code, after.status_code) == (413, 413, 200)
    assert built.reached == [CHAT]


@pytest.mark.parametrize("http", ["h11", "httptools"])
async def test_a_stream_through_a_real_server_is_whole(http: str) -> None:
    built = services()
    async with served(built.app, http) as port, httpx.AsyncClient() as client:
        response = await client.post(f"http://127.0.0.1:{port}/v1/slow")
    assert response.text == "data: 0\n\ndata: 1\n\ndata: 2\n\n"
