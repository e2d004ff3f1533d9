"""`/soma/sessions`: a tenant lists, shows and removes its own sessions; an administrator controls all of them.

Guarantees: without the admin key a session is looked up in the caller's own tenant alone, and another's answers
404 as one that does not exist; no answer holds conversation text.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from soma_vllm.api.auth.access import caller_of, require_admin
from soma_vllm.api.error_responses import TranslatingRoute
from soma_vllm.api.serializers import summary_view, view
from soma_vllm.maintenance.session_admin import SessionAdmin
from soma_vllm.types import Role, SessionKey

router = APIRouter(prefix="/soma/sessions", route_class=TranslatingRoute)

MOST_LISTED = 1000

Tenant = Annotated[str | None, Query(max_length=64)]


class Pin(BaseModel):
    """Body of a pin."""

    model_config = ConfigDict(extra="forbid")
    engine: Literal["original", "surrogate"] | None


@router.get("")
async def list_sessions(
    raw_request: Request,
    tenant: Tenant = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100,
    before: float | None = None,
) -> Response:
    """The caller's sessions, or for an administrator those of one tenant or of all, most recent first.

    `before` continues a listing: the `updated_at` of its last session.
    """
    caller = caller_of(raw_request)
    whose = tenant if caller.admin else caller.tenant
    found = await _session_admin(raw_request).summaries(whose, limit, before)
    data = [summary_view(summary) for summary in found]
    return JSONResponse({"object": "list", "data": data, "admin": caller.admin})


@router.post("/{session:path}/pin")
async def pin_session(session: str, pin: Pin, raw_request: Request, tenant: Tenant = None) -> Response:
    """Pin a session to an engine; null unpins it. Administrators only."""
    engine = None if pin.engine is None else Role(pin.engine)
    return await _ordered(
        raw_request, session, tenant, lambda session_admin, key: session_admin.pin(key, engine)
    )


@router.post("/{session:path}/rollback")
async def roll_session_back(session: str, raw_request: Request, tenant: Tenant = None) -> Response:
    """Roll a session back to the original. Administrators only."""
    return await _ordered(raw_request, session, tenant, lambda session_admin, key: session_admin.roll_back(key))


@router.post("/{session:path}/readapt")
async def readapt_session(session: str, raw_request: Request, tenant: Tenant = None) -> Response:
    """Adapt a session again. Administrators only."""
    return await _ordered(raw_request, session, tenant, lambda session_admin, key: session_admin.readapt(key))


@router.get("/{session:path}")
async def show_session(session: str, raw_request: Request, tenant: Tenant = None) -> Response:
    """One session in numbers."""
    return await _shown(raw_request, _key(raw_request, session, tenant))


@router.delete("/{session:path}")
async def remove_session(session: str, raw_request: Request, tenant: Tenant = None) -> Response:
    """Remove a session: its record, its text, its adapter. 204 when all of it is removed; 202 where that takes
    long, because a request of the session is under way: it goes on, and GET answers 404 once it is done."""
    done = await _session_admin(raw_request).remove(_key(raw_request, session, tenant))
    if done:
        return Response(status_code=204)
    return JSONResponse({"object": "soma.session", "id": session, "status": "removing"}, status_code=202)


async def _ordered(raw_request: Request, session: str, tenant: str | None, order: Any) -> Response:
    """Carry out an administrator's operation, then show the session."""
    key = _key(raw_request, session, tenant)
    require_admin(raw_request)
    await order(_session_admin(raw_request), key)
    return await _shown(raw_request, key)


async def _shown(raw_request: Request, key: SessionKey) -> Response:
    session_admin = _session_admin(raw_request)
    entry = await session_admin.entry(key)
    return JSONResponse(view(entry, session_admin.idle(key)))


def _key(raw_request: Request, session: str, tenant: str | None) -> SessionKey:
    """The session meant: an administrator may name another tenant."""
    caller = caller_of(raw_request)
    return SessionKey(tenant if caller.admin and tenant is not None else caller.tenant, session)


def _session_admin(raw_request: Request) -> SessionAdmin:
    session_admin: SessionAdmin = raw_request.app.state.soma_session_admin
    return session_admin
