"""`/soma/adapters`: the adapters of a running server, and what an administrator may do with it.

Guarantees: without the admin key only the caller's own adapters are seen, and another's answer 404 like one
that does not exist; an adapter is taken from its sessions, and out of the engine, before its files go.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response

from soma_vllm.api.auth.access import CALLER
from soma_vllm.api.auth.quotas import Caller
from soma_vllm.api.error_responses import failed
from soma_vllm.errors import Forbidden, SomaError
from soma_vllm.maintenance.adapter_eviction import AdapterEvictor

router = APIRouter(prefix="/soma/adapters")

MOST_LISTED = 10_000


@router.get("")
async def list_adapters(
    raw_request: Request,
    tenant: Annotated[str | None, Query(max_length=128)] = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
) -> Response:
    """The caller's adapters, or for an administrator those of one tenant or of all, the last used first."""
    caller = _caller(raw_request)
    try:
        found = await _adapters(raw_request).listed(tenant if caller.admin else caller.tenant)
    except SomaError as error:
        return failed(error)
    return JSONResponse({"object": "list", "data": found[:limit], "count": len(found)})


@router.post("/gc")
async def sweep(raw_request: Request) -> Response:
    """Keep to the budgets now. Administrators only."""
    if not _caller(raw_request).admin:
        return _refused()
    try:
        return JSONResponse({"evicted": await _adapters(raw_request).sweep()})
    except SomaError as error:
        return failed(error)


@router.get("/{name}")
async def show_adapter(name: str, raw_request: Request) -> Response:
    """One adapter, and the sessions that it serves."""
    caller = _caller(raw_request)
    try:
        return JSONResponse(await _adapters(raw_request).show(None if caller.admin else caller.tenant, name))
    except SomaError as error:
        return failed(error)


@router.delete("/{name}")
async def remove_adapter(name: str, raw_request: Request) -> Response:
    """Evict one adapter; answers when it is gone. Administrators only."""
    if not _caller(raw_request).admin:
        return _refused()
    try:
        await _adapters(raw_request).remove(name)
    except SomaError as error:
        return failed(error)
    return Response(status_code=204)


def _refused() -> Response:
    return failed(Forbidden("found an API key without this right; expected the admin key"))


def _caller(raw_request: Request) -> Caller:
    caller: Caller = raw_request.scope["state"][CALLER]
    return caller


def _adapters(raw_request: Request) -> AdapterEvictor:
    adapters: AdapterEvictor = raw_request.app.state.soma_evictor
    return adapters
