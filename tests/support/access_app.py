"""A small application behind the middleware of access, and a server's side of ASGI to call it from."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse

from soma_vllm.api.auth.access import CALLER, AccessControl
from soma_vllm.api.auth.key_cache import KeyCache
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.config import Access, Limits
from soma_vllm.sessions.sql.api_keys import KeyStore

MIB = 1024 * 1024
ADMIN = "admin-of-this-test"
CHAT = "/v1/chat/completions"


class Body(BaseModel):
    """What the application under test is sent, read the way vLLM reads a request."""

    text: str = ""


@dataclass
class Services:
    """The application, what happened in it, and the gate in front."""

    app: FastAPI
    quotas: Quotas
    registry: CollectorRegistry
    keys: KeyStore | None = None
    reached: list[str] = field(default_factory=list)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)

    def counted(self, reason: str) -> float:
        return self.registry.get_sample_value("soma_refusals_total", {"reason": reason}) or 0.0

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://soma")


def services(limits: Limits | None = None, keys: KeyStore | None = None, clock: Any = None) -> Services:
    registry = CollectorRegistry()
    access = Access(mode="open" if keys is None else "keys", max_body_mib=1, cache_s=0)
    cache = None if keys is None else KeyCache(keys, access.cache_s)
    timing = {} if clock is None else {"clock": clock}
    quotas = Quotas(access, limits or Limits(), cache, ADMIN, registry=registry, **timing)
    app = FastAPI()
    built = Services(app, quotas, registry, keys)
    add_routes(app, built)
    # In the order in which vLLM does it: what is added later is further out.
    app.add_middleware(AccessControl, quotas=quotas)
    app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"])
    return built


def add_routes(app: FastAPI, built: Services) -> None:
    @app.post(CHAT)
    async def chat(body: Body, request: Request) -> dict[str, Any]:
        built.reached.append(CHAT)
        caller = request.scope["state"][CALLER]
        return {"tenant": caller.tenant, "admin": caller.admin, "length": len(body.text)}

    @app.post("/v1/raw")
    async def raw(request: Request) -> dict[str, int]:
        built.reached.append("/v1/raw")
        return {"length": len(await request.body())}

    @app.post("/v1/slow")
    async def slow(request: Request) -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for number in range(3):
                yield f"data: {number}\n\n".encode()
                await asyncio.sleep(0)

        return StreamingResponse(pieces(), media_type="text/event-stream")

    @app.post("/v1/waits")
    async def waits(request: Request) -> None:
        await request.body()
        while not await request.is_disconnected():
            await asyncio.sleep(0)
        built.disconnected.set()

    @app.post("/v1/duplex")
    async def duplex(request: Request) -> StreamingResponse:
        async def echoed() -> AsyncIterator[bytes]:
            yield b"begun "
            try:
                async for piece in request.stream():
                    yield f"{len(piece)} ".encode()
            except ClientDisconnect:
                yield b"left"

        return StreamingResponse(echoed())

    @app.api_route("/{path:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
    async def anything(path: str) -> dict[str, str]:
        built.reached.append(f"/{path}")
        return {"path": path}


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def scope_of(path: str, found: Sequence[tuple[bytes, bytes]]) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), *found],
        "client": ("test", 1),
        "server": ("soma", 80),
    }


async def nothing() -> Any:
    return {"type": "http.request", "body": b""}


async def nothing_sent(message: Any) -> None:
    raise AssertionError(f"found {message['type']}; expected nothing")


untouched: list[bytes] = []
"""Pieces of a body that must not be read."""


async def asked(
    app: FastAPI, path: str, found: Sequence[tuple[bytes, bytes]], pieces: list[bytes] | None = None
) -> tuple[int, bytes]:
    """(status, body) of one POST; `pieces` are taken off as the application reads them."""
    status, body = 0, b""

    async def receive() -> Any:
        assert pieces is not untouched, "the body was read"
        if not pieces:
            return {"type": "http.request", "body": b"", "more_body": False}
        return {"type": "http.request", "body": pieces.pop(0), "more_body": True}

    async def send(message: Any) -> None:
        nonlocal status, body
        if message["type"] == "http.response.start":
            assert not status, "a second response"
            status = message["status"]
        else:
            body += message.get("body", b"")

    await app(scope_of(path, found), receive, send)
    return status, body
