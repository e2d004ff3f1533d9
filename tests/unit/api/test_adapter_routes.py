"""`/soma/adapters`: who may see what, and who may delete it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from support.services import Services

from soma_vllm.api.adapter_routes import router
from soma_vllm.api.auth.access import AccessControl
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.config import Access, Limits
from soma_vllm.sessions.state.phases import Phase

ADMIN = {"Authorization": "Bearer the-admin"}
NAME = "adapter-s-1"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
async def client(services: Services) -> AsyncIterator[httpx.AsyncClient]:
    """Routes over a house in which one session is served with an adapter."""
    services.surrogate.answers = ["different", "same"]
    history: list[dict[str, Any]] = []
    for number in (1, 2):
        await services.say(history, f"question {number}")
    await services.settled()
    await services.registry.written()
    app = FastAPI()
    app.include_router(router)
    quotas = Quotas(Access(), Limits(), admin_key="the-admin", registry=CollectorRegistry())
    app.add_middleware(AccessControl, quotas=quotas)
    app.state.soma_evictor = services.evictor
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://soma") as client:
        yield client


async def test_a_tenant_sees_its_own_adapters_and_an_administrator_all(client: httpx.AsyncClient) -> None:
    for headers, count in ((bearer("k"), 1), (bearer("other"), 0), (ADMIN, 1)):
        found = (await client.get("/soma/adapters", headers=headers)).json()
        assert (found["count"], len(found["data"])) == (count, count)
        status = (await client.get(f"/soma/adapters/{NAME}", headers=headers)).status_code
        assert status == (200 if count else 404)
    listed = await client.get("/soma/adapters", headers=ADMIN, params={"tenant": "nobody"})
    assert listed.json()["data"] == []
    shown = (await client.get(f"/soma/adapters/{NAME}", headers=bearer("k"))).json()
    assert (shown["state"], shown["serves"], shown["bytes"]) == ("ACTIVE", ["s"], 1024)
    assert "path" not in shown


async def test_only_an_administrator_deletes_and_the_session_goes_back_first(
    client: httpx.AsyncClient, services: Services
) -> None:
    for method, path in (("DELETE", f"/{NAME}"), ("POST", "/gc")):
        refused = await client.request(method, f"/soma/adapters{path}", headers=bearer("k"))
        assert refused.status_code == 403
    assert services.session().phase is Phase.SWITCHED
    swept = await client.post("/soma/adapters/gc", headers=ADMIN)
    assert swept.json() == {"evicted": 0}
    assert (await client.delete(f"/soma/adapters/{NAME}", headers=ADMIN)).status_code == 204
    assert services.session().phase is Phase.ROLLED_BACK
    assert services.adapter_store.there == {}
    again = await client.delete(f"/soma/adapters/{NAME}", headers=ADMIN)
    assert (again.status_code, again.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize("query", [{"limit": 0}, {"limit": 10_001}, {"tenant": "x" * 129}])
async def test_a_query_out_of_its_range_is_refused(client: httpx.AsyncClient, query: dict[str, Any]) -> None:
    assert (await client.get("/soma/adapters", headers=ADMIN, params=query)).status_code == 422
