"""The audit trail: which requests are orders, who gave them, and who may read them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from support.guard import GUARD_S
from support.services import Services
from typer.testing import CliRunner

from soma_vllm.api import adapter_routes, admin, audit
from soma_vllm.api.auth.access import AccessControl
from soma_vllm.api.auth.key_cache import KeyCache
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.api.request_id import RequestId
from soma_vllm.cli.main import app as soma
from soma_vllm.config import Access, Limits
from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.audit_trail import Order
from soma_vllm.sessions.sql.store import reading

ADMIN = {"Authorization": "Bearer the-admin", "X-Request-Id": "request-1"}


@pytest.fixture
async def client(services: Services, keys: KeyStore) -> AsyncIterator[httpx.AsyncClient]:
    """Administrators' routes over services in which two sessions of key `k` were served."""
    for session in ("s", "other"):
        await services.say([], "question", session=session)
    await services.registry.written()
    app = FastAPI()
    for part in (admin, adapter_routes, audit):
        app.include_router(part.router)

    @app.post("/v1/chat/completions")
    async def chat() -> dict[str, Any]:
        return {}

    quotas = Quotas(
        Access(mode="keys"), Limits(), KeyCache(keys, 0.0), "the-admin", registry=CollectorRegistry()
    )
    app.add_middleware(audit.AuditedOrders)
    app.add_middleware(AccessControl, quotas=quotas)
    app.add_middleware(RequestId)
    app.state.soma_evictor = services.evictor
    app.state.soma_session_admin = services.session_admin
    app.state.soma_audit = services.registry.store.audit
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://soma") as client:
        yield client


async def trail(client: httpx.AsyncClient, **query: Any) -> list[dict[str, Any]]:
    found = await client.get("/soma/audit", headers=ADMIN, params=query)
    data: list[dict[str, Any]] = found.json()["data"]
    return data


async def test_each_order_of_the_administrator_is_one_record_with_who_what_when_and_its_request(
    client: httpx.AsyncClient, services: Services
) -> None:
    tenant = services.session().key.tenant
    pin = await client.post(
        "/soma/sessions/s/pin", headers=ADMIN, params={"tenant": tenant}, json={"engine": "original"}
    )
    removal = await client.delete("/soma/sessions/s", headers=ADMIN, params={"tenant": tenant})
    sweep = await client.post("/soma/adapters/gc", headers=ADMIN)
    assert (pin.status_code, removal.status_code, sweep.status_code) == (200, 204, 200)
    found = await trail(client)
    assert [order["what"] for order in found] == [
        "POST /soma/adapters/gc",
        f"DELETE /soma/sessions/s?tenant={tenant}",
        f"POST /soma/sessions/s/pin?tenant={tenant}",
    ]
    assert {(order["who"], order["request"]) for order in found} == {("admin", "request-1")}
    assert sorted(order["at"] for order in found) == [order["at"] for order in reversed(found)]
    assert await trail(client, limit=1, before=found[0]["number"]) == found[1:2]


async def test_a_removal_that_takes_long_is_answered_at_once_and_goes_on(
    client: httpx.AsyncClient, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, shown = services.session().key, {"tenant": services.session().key.tenant}
    soon = partial(services.session_admin.remove, wait_s=0.05)
    monkeypatch.setattr(services.session_admin, "remove", soon)
    async with services.registry.lease(key):
        begun = await client.delete("/soma/sessions/s", headers=ADMIN, params=shown)
        assert (begun.status_code, begun.json()["status"]) == (202, "removing")
    assert len(await trail(client)) == 1
    async with asyncio.timeout(GUARD_S):
        while (await client.get("/soma/sessions/s", headers=ADMIN, params=shown)).status_code != 404:
            await asyncio.sleep(0.01)


async def test_what_failed_or_was_only_looked_at_is_no_order(client: httpx.AsyncClient) -> None:
    for method, path in (("GET", "/soma/sessions"), ("DELETE", "/soma/sessions/none-such")):
        await client.request(method, path, headers=ADMIN)
    await client.post("/v1/chat/completions", headers=ADMIN)
    assert await trail(client) == []


async def test_a_policy_or_a_candidate_that_the_administrator_asks_for_by_header_is_an_order(
    client: httpx.AsyncClient, keys: KeyStore
) -> None:
    _, key = await keys.add("Ana", Limits())
    wish = {"X-SOMA-Policy": "history_ft", "X-SOMA-Force": "adapter"}
    await client.post("/v1/chat/completions", headers={**ADMIN, **wish})
    await client.post("/v1/chat/completions", headers={"Authorization": f"Bearer {key}", **wish})
    (order,) = await trail(client)
    assert order["what"] == "POST /v1/chat/completions x-soma-policy=history_ft x-soma-force=adapter"


async def test_a_key_is_told_by_its_id_and_reads_no_trail(client: httpx.AsyncClient, keys: KeyStore) -> None:
    key_id, key = await keys.add("Ana", Limits())
    secret = {"Authorization": f"Bearer {key}"}
    refused = await client.delete("/soma/sessions/s", headers=secret)
    assert refused.status_code == 404
    assert (await client.get("/soma/audit", headers=secret)).status_code == 403
    scope = {"type": "http", "method": "DELETE", "path": "/soma/sessions/s", "headers": []}
    caller = await Quotas(
        Access(mode="keys"), Limits(), KeyCache(keys, 0.0), registry=CollectorRegistry()
    ).caller(f"Bearer {key}")
    found = audit.order_of({**scope, "state": {"soma_caller": caller}})
    assert found is not None
    assert found.who == f"key {key_id}"
    assert key not in repr(found)


async def test_an_order_that_cannot_be_recorded_is_in_the_log_and_was_carried_out(
    client: httpx.AsyncClient,
    services: Services,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def away(order: Order) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(services.registry.store.audit, "note", away)
    with caplog.at_level("INFO", "soma_vllm"):
        assert (await client.post("/soma/adapters/gc", headers=ADMIN)).status_code == 200
    assert [record.levelname for record in caplog.records if "order" in record.message] == ["INFO", "ERROR"]


async def test_a_key_added_and_revoked_by_a_command_is_on_record(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path}/s.db"
    store = KeyStore.at(url)
    await store.open()
    key_id, key = await store.add("Ana", Limits(), by="operator root")
    await store.revoke(key_id, "operator root")
    await store.close()
    async with reading(url) as sessions:
        found = await sessions.audit.latest(10)
    assert [(order.who, order.what) for order in found] == [
        ("operator root", f"key revoke {key_id}"),
        ("operator root", f"key add {key_id} (Ana)"),
    ]
    assert key not in repr(found)


def test_soma_keys_says_which_user_gave_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ana")
    url = f"sqlite+aiosqlite:///{tmp_path}/s.db"
    assert CliRunner().invoke(soma, ["keys", "add", "Ana", "--storage", url]).exit_code == 0

    async def look() -> list[Order]:
        async with reading(url) as sessions:
            return await sessions.audit.latest(10)

    (order,) = asyncio.run(look())
    assert order.who == "operator ana"
