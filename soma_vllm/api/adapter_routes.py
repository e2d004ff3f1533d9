"""`/soma/adapters`: the stored adapters of a running server, and an administrator's operations on them.

Guarantees: without the admin key only the caller's own adapters are shown, and another's answers 404 as one
that does not exist; an adapter is withdrawn from its sessions and from the engine before its files are removed.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from soma_vllm.api.auth.access import caller_of, require_admin
from soma_vllm.api.error_responses import TranslatingRoute
from soma_vllm.maintenance.adapter_eviction import AdapterEvictor

router = APIRouter(prefix="/soma/adapters", route_class=TranslatingRoute)

MOST_LISTED = 10_000


@router.get("")
async def list_adapters(
    raw_request: Request,
    tenant: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
) -> Response:
    """The caller's adapters, or for an administrator those of one tenant or of all; latest use first."""
    caller = caller_of(raw_request)
    found = await _adapters(raw_request).listed(tenant if caller.admin else caller.tenant)
    return JSONResponse({"object": "list", "data": found[:limit], "count": len(found)})


@router.post("/gc")
async def sweep(raw_request: Request) -> Response:
    """Enforce the budgets now, and delete what a kill left of this record's adapters. Administrators only."""
    require_admin(raw_request)
    return JSONResponse({"evicted": await _adapters(raw_request).collect()})


@router.get("/{name}")
async def show_adapter(name: str, raw_request: Request) -> Response:
    """One adapter and the sessions that it serves."""
    caller = caller_of(raw_request)
    return JSONResponse(await _adapters(raw_request).show(None if caller.admin else caller.tenant, name))


@router.delete("/{name}")
async def remove_adapter(name: str, raw_request: Request) -> Response:
    """Evict one adapter; answers when it is removed. Administrators only."""
    require_admin(raw_request)
    await _adapters(raw_request).remove(name)
    return Response(status_code=204)


def _adapters(raw_request: Request) -> AdapterEvictor:
    adapters: AdapterEvictor = raw_request.app.state.soma_evictor
    return adapters
