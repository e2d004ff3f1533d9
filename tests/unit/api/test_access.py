"""The middleware in front of a small application, called as a server calls it, and behind real uvicorn."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from support.guard import GUARD_S

from soma_vllm.api.auth.access import CALLER, KEYED, KEYED_BELOW, OPEN, STEERING, AccessControl
from soma_vllm.api.auth.key_cache import KeyCache
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.config import Access, Limits
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.state.identity import tenant_of
from soma_vllm.types import Usage

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


@pytest.fixture
async def keys(tmp_path: Path) -> AsyncIterator[KeyStore]:
    store = KeyStore.at(f"sqlite+aiosqlite:///{tmp_path}/sessions.db")
    await store.open()
    yield store
    await store.close()


def with_key(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


# -- keys -----------------------------------------------------------------------------------------------


async def test_an_issued_key_is_served_as_its_tenant(keys: KeyStore) -> None:
    built = services(keys=keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        response = await client.post(CHAT, json={"text": "abc"}, headers=with_key(key))
    assert response.json() == {"tenant": tenant_of(f"Bearer {key}"), "admin": False, "length": 3}


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer nope"}, {"Authorization": "Basic YTpi"}, {"X-API-Key": "nope"}],
)
async def test_without_a_known_key_the_answer_is_openais_401(keys: KeyStore, headers: dict[str, str]) -> None:
    built = services(keys=keys)
    async with built.client() as client:
        response = await client.post(CHAT, json={}, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("UnauthorizedError", "invalid_api_key", None)
    assert not built.reached
    assert built.counted("key") == 1


async def test_a_key_that_was_revoked_is_refused(keys: KeyStore) -> None:
    built = services(keys=keys)
    key_id, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        assert (await client.post(CHAT, json={}, headers=with_key(key))).status_code == 200
        await keys.revoke(key_id)
        assert (await client.post(CHAT, json={}, headers=with_key(key))).status_code == 401


async def test_wrong_revoked_and_unknown_keys_are_answered_alike(keys: KeyStore) -> None:
    built = services(keys=keys)
    key_id, revoked = await keys.add("Ana", Limits())
    await keys.revoke(key_id)
    _, good = await keys.add("Bo", Limits())
    unknown = "sk-soma-" + "f" * 12 + "-" + "x" * 43
    async with built.client() as client:
        answers = [
            await client.post(CHAT, json={}, headers=with_key(key))
            for key in (revoked, good[:-2] + "__", unknown, "hello")
        ]
    assert {(answer.status_code, answer.text) for answer in answers} == {(401, answers[0].text)}


@pytest.mark.parametrize("path", sorted(OPEN))
async def test_the_open_paths_need_no_key_not_even_a_sensible_header(keys: KeyStore, path: str) -> None:
    async with services(keys=keys).client() as client:
        assert (await client.get(path, headers={"Authorization": "\x7f"})).status_code < 400


CLOSED = [
    "/v1/models",
    "/v1/completions",
    "/v1/responses/r1",
    "/healthz",
    "/health/",
    "/load",
    "/anything",
]


@pytest.mark.parametrize("path", [*CLOSED, "/soma/sessions", "/HEALTH", "//health", "/metricsx", "/tokenize"])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "HEAD", "BREW"])
async def test_every_other_path_is_closed_whatever_the_method(keys: KeyStore, path: str, method: str) -> None:
    built = services(keys=keys)
    async with built.client() as client:
        assert (await client.request(method, f"http://soma{path}")).status_code == 401
    assert not built.reached


async def test_a_preflight_of_a_browser_is_answered_before_keys_are_asked_for(keys: KeyStore) -> None:
    wish = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    async with services(keys=keys).client() as client:
        assert (await client.options(CHAT, headers=wish)).status_code == 200
        refused = await client.post(CHAT, json={}, headers={"Origin": "http://page"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "*"


STEERS = ["/scale_elastic_ep", "/start_profile", "/pause", "/collective_rpc", "/new_in_vllm", *sorted(STEERING)]


@pytest.mark.parametrize("path", STEERS)
async def test_routes_that_steer_the_server_are_the_admins(keys: KeyStore, path: str) -> None:
    built = services(keys=keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        refused = await client.post(path, headers=with_key(key))
        allowed = await client.post(path, headers=with_key(ADMIN))
    assert (refused.status_code, allowed.status_code) == (403, 200)
    assert built.counted("admin") == 1


@pytest.mark.parametrize("path", sorted(KEYED) + [f"{prefix}x" for prefix in KEYED_BELOW])
async def test_the_other_routes_are_for_every_key(keys: KeyStore, path: str) -> None:
    _, key = await keys.add("Ana", Limits())
    async with services(keys=keys).client() as client:
        assert (await client.post(path, headers=with_key(key))).status_code == 200


async def test_a_path_below_a_proxys_prefix_is_judged_without_it(keys: KeyStore) -> None:
    built = services(keys=keys)
    built.app.root_path = "/api"
    async with built.client() as client:
        assert (await client.get("/api/health")).status_code == 200
        assert (await client.get("/api/v1/models")).status_code == 401
        assert (await client.get("/api/healthz")).status_code == 401


async def test_while_the_database_is_away_an_unknown_key_is_told_to_come_back(tmp_path: Path) -> None:
    keys = KeyStore.at(f"sqlite+aiosqlite:///{tmp_path}/none/sessions.db")
    built = services(keys=keys)
    async with built.client() as client:
        response = await client.post(CHAT, json={}, headers=with_key("sk-soma-0123456789ab-" + "s" * 32))
    await keys.close()
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert built.counted("store") == 1


async def test_without_keys_everyone_is_let_in_as_before() -> None:
    built = services()
    async with built.client() as client:
        answers = [
            (await client.post(CHAT, json={}, headers=headers)).json()["tenant"]
            for headers in ({}, with_key("a"), with_key("b"))
        ]
        assert (await client.post("/start_profile")).status_code == 200
    assert answers == ["public", tenant_of("Bearer a"), tenant_of("Bearer b")]


# -- headers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"Bearer " + b"x" * MIB, "found 1048583 bytes; expected at most 4096"),
        (b"Bearer a\nb", "control characters"),
        (b"Bearer a\x00", "control characters"),
        (b"Bearer\ta", "control characters"),
    ],
)
async def test_an_authorization_that_cannot_be_one_is_a_400(value: bytes, told: str) -> None:
    built = services()
    status, body = await asked(built.app, CHAT, [(b"authorization", value)])
    assert status == 400
    assert told in json.loads(body)["error"]["message"]
    assert built.counted("malformed") == 1


async def test_several_authorizations_are_a_400_in_either_mode(keys: KeyStore) -> None:
    _, key = await keys.add("Ana", Limits())
    twice = [(b"authorization", f"Bearer {key}".encode())] * 2
    for built in (services(), services(keys=keys)):
        status, body = await asked(built.app, CHAT, twice)
        assert status == 400
        assert b"found 2 headers; expected one" in body
        assert not built.reached


headers = st.lists(
    st.tuples(
        st.sampled_from([b"authorization", b"content-length", b"x-session-id", b"host"]),
        st.one_of(
            st.binary(max_size=200),
            st.builds(lambda tail: b"Bearer " + tail, st.binary(max_size=80)),
            st.sampled_from([b"-1", b"9" * 6000, b"1e9", b"0x10", "٣".encode(), b" 5"]),
        ),
    ),
    max_size=4,
)


@given(headers)
async def test_no_header_makes_a_500(found: list[tuple[bytes, bytes]]) -> None:
    class Nobody:
        async def verify(self, key: str) -> None:
            return None

    for keys in (None, Nobody()):
        built = services(keys=keys)
        status, body = await asked(built.app, CHAT, found, [b"{}"])
        assert status in (200, 400, 401, 413)
        assert keys is None or status != 200
        json.loads(body)


# -- bodies ---------------------------------------------------------------------------------------------


async def test_a_declared_length_above_the_limit_is_refused_before_a_byte_is_read() -> None:
    built = services()
    length = (b"content-length", str(MIB + 1).encode())
    status, body = await asked(built.app, CHAT, [length], untouched)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert "found more than 1 MiB" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize("path", [CHAT, "/v1/raw"])
@pytest.mark.parametrize("length", [None, b"10", b"nonsense"])
async def test_a_body_that_grows_too_large_is_refused_whatever_it_declared(
    path: str, length: bytes | None
) -> None:
    built = services()
    pieces = [b"x" * (MIB // 4)] * 9
    sent = [(b"content-length", length)] if length is not None else []
    status, body = await asked(built.app, path, sent, pieces)
    assert status == 413
    assert json.loads(body)["error"]["code"] == "body_too_large"
    assert len(pieces) == 9 - 5, "no more is read than shows that it is too large"
    assert CHAT not in built.reached
    assert built.counted("body") == 1


async def test_a_body_of_exactly_the_limit_passes() -> None:
    status, body = await asked(services().app, "/v1/raw", [], [b"x" * (MIB // 2)] * 2)
    assert (status, json.loads(body)) == (200, {"length": MIB})


async def test_the_application_gets_each_piece_as_it_comes() -> None:
    status, body = await asked(services().app, "/v1/duplex", [], [b"a", b"bb", b"ccc"])
    assert (status, body) == (200, b"begun 1 2 3 0 ")


async def test_a_body_that_grows_too_large_under_a_running_reply_looks_like_a_client_that_left() -> None:
    built = services()
    status, body = await asked(built.app, "/v1/duplex", [], [b"x" * MIB, b"x"])
    assert (status, body) == (200, b"begun 1048576 left")
    assert built.counted("body") == 1


async def test_an_open_path_takes_no_larger_body() -> None:
    built = services()
    status, _ = await asked(built.app, "/ping", [(b"content-length", b"99999999")], untouched)
    assert status == 413


# -- limits ---------------------------------------------------------------------------------------------


async def test_the_request_above_the_limit_is_told_exactly_when_to_come_back() -> None:
    clock = Clock()
    built = services(Limits(requests_per_minute=2), clock=clock)
    async with built.client() as client:
        for clock.now in (1000.0, 1012.5):
            assert (await client.post(CHAT, json={})).status_code == 200
        clock.now = 1020.25
        refused = await client.post(CHAT, json={})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "40"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        clock.now = 1020.25 + 40 - 1
        assert (await client.post(CHAT, json={})).status_code == 429
        clock.now = 1020.25 + 40
        assert (await client.post(CHAT, json={})).status_code == 200
    assert built.counted("requests_per_minute") == 2


CHEAP = [("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/v1/messages/count_tokens")]
CHEAP += [("POST", "/v1/conversations"), ("GET", "/soma/sessions"), ("DELETE", "/soma/sessions/s")]


@pytest.mark.parametrize(("method", "path"), CHEAP)
async def test_what_costs_the_processor_or_the_database_counts_though_it_needs_no_tokens(
    method: str, path: str
) -> None:
    built = services(Limits(requests_per_minute=2, tokens_per_minute=1))
    built.quotas.spent("public", Usage(1, None, 1))
    async with built.client() as client:
        statuses = [(await client.request(method, path)).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        for _ in range(3):
            admin = await client.request(method, path, headers={"Authorization": f"Bearer {ADMIN}"})
            assert admin.status_code == 200


async def test_requests_that_cost_next_to_nothing_do_not_count() -> None:
    built = services(Limits(requests_per_minute=1))
    async with built.client() as client:
        for _ in range(5):
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.delete("/v1/responses/r1")).status_code == 200
            for path in ("/v1/responses/r1/cancel", "/ping"):
                assert (await client.post(path)).status_code == 200
        assert (await client.post("/v1/messages")).status_code == 200
        for path in (CHAT, "/invocations", "/inference/v1/generate", "/v1/not_yet_known"):
            assert (await client.post(path)).status_code == 429


async def test_a_request_refused_for_its_key_or_size_takes_nothing_from_the_limit(keys: KeyStore) -> None:
    built = services(Limits(requests_per_minute=1), keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        assert (await client.post(CHAT, json={}, headers=with_key(key + "x"))).status_code == 401
        large = await client.post(CHAT, content=b"x" * (MIB + 1), headers=with_key(key))
        assert large.status_code == 413
        assert (await client.post(CHAT, json={}, headers=with_key(key))).status_code == 200


async def test_a_keys_own_limit_counts_instead_of_the_configured_one(keys: KeyStore) -> None:
    built = services(Limits(requests_per_minute=1), keys)
    _, free = await keys.add("free", Limits(requests_per_minute=None))
    _, usual = await keys.add("usual", Limits())
    async with built.client() as client:
        for _ in range(5):
            assert (await client.post(CHAT, json={}, headers=with_key(free))).status_code == 200
        assert (await client.post(CHAT, json={}, headers=with_key(usual))).status_code == 200
        assert (await client.post(CHAT, json={}, headers=with_key(usual))).status_code == 429


async def test_of_many_requests_at_once_exactly_the_allowed_ones_pass(keys: KeyStore) -> None:
    built = services(Limits(requests_per_minute=10), keys)
    _, key = await keys.add("Ana", Limits())
    async with built.client() as client:
        answers = await asyncio.gather(*(client.post(CHAT, json={}, headers=with_key(key)) for _ in range(50)))
    assert sorted(answer.status_code for answer in answers) == [200] * 10 + [429] * 40


async def test_spent_tokens_refuse_the_next_request_and_only_that_tenants() -> None:
    clock = Clock()
    built = services(Limits(tokens_per_minute=100), clock=clock)
    async with built.client() as client:
        assert (await client.post(CHAT, json={}, headers=with_key("a"))).status_code == 200
        built.quotas.spent(tenant_of("Bearer a"), Usage(90, None, 10))
        clock.now += 18.0
        refused = await client.post(CHAT, json={}, headers=with_key("a"))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "42")
        assert (await client.get("/v1/models", headers=with_key("a"))).status_code == 200
        assert (await client.post(CHAT, json={}, headers=with_key("b"))).status_code == 200


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


# -- a server's side of ASGI ----------------------------------------------------------------------------


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
