"""The original's client against real servers on loopback and on a Unix socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from support.guard import GUARD_S

from soma_vllm.engines.child_process import ChildServer
from soma_vllm.engines.engine import ChatCall
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.supervisor import Supervisor
from soma_vllm.errors import EngineRefused, EngineUnavailable, PreflightError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
CALL = ChatCall(body={"model": "soma", "messages": [{"role": "user", "content": "hi"}], "top_k": 3})
EVENT = b'data: {"choices":[]}\n\n'
WHOLE = {"object": "chat.completion", "choices": [{"index": 0, "message": {"content": "x"}}]}
STREAM = ChatCall(body={**CALL.body, "stream": True})


class Upstream:
    """A small OpenAI-compatible server. `handler` answers; `requests` and `headers` are what it got."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.left = asyncio.Event()
        self.handler: Handler = self.whole
        self.url = ""

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.headers.append(dict(request.headers))
        return await self.handler(request)

    async def whole(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(WHOLE)

    def stream(self, *pieces: bytes, then: str = "end") -> None:
        """Send pieces as they are; then end, break the connection, or stay silent until the client leaves."""

        async def handler(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for piece in pieces:
                await response.write(piece)
            assert request.transport is not None
            if then == "break":
                request.transport.abort()
            if then == "stay":
                await self.disconnect(request)
            return response

        self.handler = handler

    def status(self, status: int, text: str, **headers: str) -> None:
        async def handler(request: web.Request) -> web.StreamResponse:
            return web.Response(status=status, text=text, headers=headers)

        self.handler = handler

    async def disconnect(self, request: web.Request) -> None:
        try:
            await asyncio.Event().wait()  # the server cancels its handler when the client leaves
        except asyncio.CancelledError:
            self.left.set()
            raise


@pytest.fixture
async def upstream(tmp_path: Path) -> AsyncIterator[Upstream]:
    server = Upstream()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.answer)
    app.router.add_get("/v1/models", server.whole)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "u.sock")).start()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = next(address[1] for address in runner.addresses if isinstance(address, tuple))
    server.url = f"http://127.0.0.1:{port}/v1"
    yield server
    await runner.cleanup()


@pytest.fixture
async def engine(upstream: Upstream) -> AsyncIterator[OriginalEngine]:
    original = OriginalEngine("big", upstream.url)
    yield original
    await original.close()


async def collect(engine: OriginalEngine, call: ChatCall = STREAM) -> list[str]:
    reply = await engine.chat(call)
    assert reply.events is not None
    return [event async for event in reply.events]


async def test_the_clients_body_goes_out_as_it_came_under_the_originals_name(
    engine: OriginalEngine, upstream: Upstream
) -> None:
    reply = await engine.chat(CALL)
    assert reply.body == WHOLE
    assert reply.events is None
    assert upstream.requests == [{**CALL.body, "model": "big"}]
    assert "Authorization" not in upstream.headers[0]


async def test_events_come_out_whole_however_the_network_cuts_them(
    engine: OriginalEngine, upstream: Upstream
) -> None:
    text = 'data: {"choices":[],"a":"\u00e9\u2028"}\n\n'.encode()
    second = b': keep-alive\n\ndata: {"choices":[]}\r\n'
    upstream.stream(text[:25], text[25:] + second, b"\r\ndata: [DO", b"NE]\n\n")
    assert await collect(engine) == [text.decode(), EVENT.decode(), "data: [DONE]\n\n"]


async def test_the_key_of_the_endpoint_is_sent(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIG_KEY", "sesame")
    engine = OriginalEngine("big", upstream.url, api_key_env="BIG_KEY")
    await engine.chat(CALL)
    assert upstream.headers[0]["Authorization"] == "Bearer sesame"
    await engine.close()


def test_a_key_that_is_not_set_is_told_by_its_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BIG_KEY", raising=False)
    with pytest.raises(PreflightError, match="BIG_KEY is not set"):
        OriginalEngine("big", "http://127.0.0.1:1/v1", api_key_env="BIG_KEY")


async def test_closing_a_stream_early_is_seen_by_the_server(engine: OriginalEngine, upstream: Upstream) -> None:
    upstream.stream(EVENT, then="stay")
    reply = await engine.chat(STREAM)
    assert reply.events is not None
    assert await anext(reply.events) == EVENT.decode()
    await reply.events.aclose()
    await asyncio.wait_for(upstream.left.wait(), GUARD_S)


async def test_closing_a_stream_nobody_read_is_seen_by_the_server(
    engine: OriginalEngine, upstream: Upstream
) -> None:
    upstream.stream(EVENT, then="stay")
    reply = await engine.chat(STREAM)
    assert reply.events is not None
    await reply.events.aclose()
    await asyncio.wait_for(upstream.left.wait(), GUARD_S)


@pytest.mark.parametrize("call", [CALL, STREAM], ids=["whole", "stream"])
async def test_cancelling_a_call_before_its_answer_is_seen_by_the_server(
    engine: OriginalEngine, upstream: Upstream, call: ChatCall
) -> None:
    arrived = asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        arrived.set()
        await upstream.disconnect(request)
        raise AssertionError("the client stays")

    upstream.handler = silent
    task = asyncio.create_task(engine.chat(call))
    await asyncio.wait_for(arrived.wait(), GUARD_S)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(upstream.left.wait(), GUARD_S)


@pytest.mark.parametrize("then", ["end", "break"])
async def test_a_stream_without_its_end_mark_breaks_for_the_reader(
    engine: OriginalEngine, upstream: Upstream, then: str
) -> None:
    upstream.stream(EVENT, then=then)
    reply = await engine.chat(STREAM)
    assert reply.events is not None
    assert await anext(reply.events) == EVENT.decode()
    with pytest.raises(EngineUnavailable):
        await anext(reply.events)


async def test_a_stream_that_breaks_before_its_first_event_is_a_failed_call(
    engine: OriginalEngine, upstream: Upstream
) -> None:
    upstream.stream(b"data: 1", then="end")
    with pytest.raises(EngineUnavailable, match="without a finish_reason"):
        await engine.chat(STREAM)


@pytest.mark.parametrize("call", [CALL, STREAM], ids=["whole", "stream"])
async def test_a_refusal_of_the_original_keeps_its_status_and_body(
    engine: OriginalEngine, upstream: Upstream, call: ChatCall
) -> None:
    upstream.status(400, '{"error": {"message": "too long"}}')
    with pytest.raises(EngineRefused) as refusal:
        await engine.chat(call)
    error = {"message": "too long", "type": "upstream_error", "param": None, "code": 400}
    assert (refusal.value.status, refusal.value.body) == (400, {"error": error})


async def test_a_refusal_that_comes_as_the_first_event_keeps_its_status(
    engine: OriginalEngine, upstream: Upstream
) -> None:
    upstream.stream(b'data: {"error": {"message": "logprobs", "code": 400}}\n\ndata: [DONE]\n\n', then="end")
    with pytest.raises(EngineRefused) as refusal:
        await engine.chat(STREAM)
    assert (refusal.value.status, refusal.value.body["error"]["message"]) == (400, "logprobs")


async def test_a_refusal_without_json_becomes_an_openai_error(
    engine: OriginalEngine, upstream: Upstream
) -> None:
    upstream.status(413, "<html>oops</html>")
    with pytest.raises(EngineRefused) as refusal:
        await engine.chat(CALL)
    assert refusal.value.body["error"]["code"] == 413
    assert "oops" not in str(refusal.value.body)


@pytest.mark.parametrize("status", [408, 500, 502, 503, 504, 529])
async def test_a_failure_of_the_server_means_unavailable_for_as_long_as_it_says(
    engine: OriginalEngine, upstream: Upstream, status: int
) -> None:
    upstream.status(status, "{}", **{"Retry-After": "17"})
    with pytest.raises(EngineUnavailable) as error:
        await engine.chat(CALL)
    assert error.value.retry_after == 17


async def test_a_refused_key_is_ours_to_mend_and_its_answer_stays_here(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BIG_KEY", "sesame")
    engine = OriginalEngine("big", upstream.url, api_key_env="BIG_KEY")
    upstream.status(401, '{"error": {"message": "wrong key: ses***"}}')
    with pytest.raises(EngineUnavailable, match="the key in BIG_KEY") as error:
        await engine.chat(CALL)
    assert "ses***" not in str(error.value)
    await engine.close()


async def test_an_answer_that_is_no_completion_means_unavailable(
    engine: OriginalEngine, upstream: Upstream
) -> None:
    for text in ("not json", "[1]"):
        upstream.status(200, text)
        with pytest.raises(EngineUnavailable):
            await engine.chat(CALL)


@pytest.mark.parametrize("call", [CALL, STREAM], ids=["whole", "stream"])
async def test_an_original_that_is_not_there_is_unavailable(unused_tcp_port: int, call: ChatCall) -> None:
    engine = OriginalEngine("big", f"http://127.0.0.1:{unused_tcp_port}/v1")
    with pytest.raises(EngineUnavailable):
        await engine.chat(call)
    await engine.close()


async def test_our_own_child_is_reached_over_its_socket_with_the_tenants_salt(
    upstream: Upstream, tmp_path: Path
) -> None:
    engine = OriginalEngine("big", "http://original/v1", socket=tmp_path / "u.sock")
    for tenant, salt in (("a", None), ("a", "mine"), ("b", "mine")):
        await engine.chat(
            ChatCall(body=CALL.body if salt is None else {**CALL.body, "cache_salt": salt}, tenant=tenant)
        )
    salts = [request["cache_salt"] for request in upstream.requests]
    assert salts[0] == "a"
    assert len(set(salts)) == 3
    await engine.close()


async def test_a_child_that_is_not_ready_is_not_even_asked(upstream: Upstream, tmp_path: Path) -> None:
    child = ChildServer(["true"], {}, tmp_path / "log", tmp_path / "u.sock")
    engine = OriginalEngine.of_child("big", Supervisor(child))
    with pytest.raises(EngineUnavailable, match="the original is stopped"):
        await engine.chat(CALL)
    assert upstream.requests == []
    await engine.close()
