"""Readiness part by part, and how a server ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.api_services import SurfaceHouse

from soma_vllm.api.draining import Draining, DrainingRequests
from soma_vllm.api.readiness import PartReport, PartState, Readiness


async def answers(draining: Draining, go: asyncio.Event) -> httpx.AsyncClient:
    async def application(scope: Any, receive: Any, send: Any) -> None:
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    transport = httpx.ASGITransport(DrainingRequests(application, draining))
    return httpx.AsyncClient(transport=transport, base_url="http://soma")


async def test_what_is_under_way_finishes_and_nothing_new_begins() -> None:
    said: list[str] = []
    draining, go, server = Draining(5.0, said.append), asyncio.Event(), SimpleNamespace(should_exit=False)
    async with await answers(draining, go) as client:
        first = asyncio.create_task(client.post("/v1/chat/completions"))
        await asyncio.sleep(0.01)
        draining.on_signal(server)
        refused = await client.post("/v1/chat/completions")
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["message"] == "this server is about to end"
        await asyncio.sleep(0.1)
        assert not server.should_exit
        go.set()
        assert (await first).text == "done"
        assert (await client.get("/health")).text == "done"
    async with asyncio.timeout(5):
        while not server.should_exit:
            await asyncio.sleep(0.01)
    assert said == ["draining   1 requests are under way (at most 5 s)"]


async def test_requests_that_take_longer_than_the_limit_are_cut_off(caplog: pytest.LogCaptureFixture) -> None:
    draining, server = Draining(0.1, lambda line: None), SimpleNamespace(should_exit=False, force_exit=False)
    async with await answers(draining, asyncio.Event()) as client:
        stuck = asyncio.create_task(client.post("/v1/chat/completions"))
        await asyncio.sleep(0.01)
        draining.on_signal(server)
        async with asyncio.timeout(5):
            while not server.should_exit:
                await asyncio.sleep(0.01)
        assert server.force_exit
        assert caplog.messages == ["1 requests were cut off after 0.1 s of draining"]
        stuck.cancel()


async def test_a_second_signal_ends_at_once() -> None:
    draining, server = Draining(60.0, lambda line: None), SimpleNamespace(should_exit=False, force_exit=False)
    draining.in_flight = 1
    draining.on_signal(server)
    assert not server.should_exit
    draining.on_signal(server)
    assert server.should_exit and server.force_exit  # noqa: PT018
    draining.in_flight = 0


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[SurfaceHouse]:
    built = await SurfaceHouse.built(tmp_path)
    yield built
    await built.close()


@pytest.mark.parametrize(
    ("worst", "status"), [(PartState.OK, 200), (PartState.DEGRADED, 200), (PartState.DOWN, 503)]
)
async def test_only_what_makes_requests_fail_makes_a_server_not_ready(
    house: SurfaceHouse, worst: PartState, status: int
) -> None:
    readiness: Readiness = house.app.state.soma_readiness
    readiness.add("store", lambda: PartReport.ok_if(True, "late"))
    readiness.add("original", lambda: PartReport.ok_if(worst is PartState.OK, "failed", worst))
    answer = await house.send("GET", "/ready", key=None)
    assert answer.status_code == status
    detail = "" if worst is PartState.OK else "failed"
    assert answer.json() == {
        "status": worst,
        "parts": {"store": {"state": "ok", "detail": ""}, "original": {"state": worst, "detail": detail}},
    }
