"""Orders over HTTP go on record: middleware behind the access control, and `GET /soma/audit` to list them.

An order is a request, other than GET, to `/soma/` or to a route that needs the admin key, and one by the admin
key that asks for a policy or a candidate by header. Guarantees: one that succeeded is on record before its
caller is told so; who gave it is told by a key's id, never by the key.
"""

from __future__ import annotations

import logging
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soma_vllm import logs
from soma_vllm.api.auth.access import CALLER, require_admin, steers
from soma_vllm.api.auth.quotas import Caller
from soma_vllm.api.error_responses import TranslatingRoute
from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.ports import in_time
from soma_vllm.sessions.sql.audit_trail import AuditTrail, Order

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/soma/audit", route_class=TranslatingRoute)

MOST_CHARS = 512
"""Of what is told of one order; ids are the client's choice."""
MOST_ORDERS = 2**31 - 1
"""As far as the record's numbers go."""
WISHES = (b"x-soma-policy", b"x-soma-force")


@router.get("")
async def list_orders(
    raw_request: Request,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    before: Annotated[int | None, Query(le=MOST_ORDERS)] = None,
) -> Response:
    """Orders, the latest first. `before` continues a listing: the `number` of its last. Administrators only."""
    require_admin(raw_request)
    found = await _trail(raw_request.scope).latest(limit, before)
    return JSONResponse({"object": "list", "data": [vars(order) for order in found]})


class AuditedOrders:
    """The middleware: `app.add_middleware(AuditedOrders)`, behind `AccessControl`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and put it on record where it is an order."""
        order = order_of(scope) if scope["type"] == "http" else None
        if order is None:
            await self._app(scope, receive, send)
            return

        async def recorded(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] < 400:
                logger.info("order by %s: %s", order.who, order.what)
                try:
                    await in_time(_trail(scope).note(order))
                except StoreUnavailable as error:
                    logger.error("the order before this line is not on record: %s", error)
            await send(message)

        await self._app(scope, receive, recorded)


def order_of(scope: Scope) -> Order | None:
    """What a request orders; None where that is nothing for the record."""
    caller: Caller | None = scope.get("state", {}).get(CALLER)
    if caller is None or scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return None
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    query = scope.get("query_string", b"").decode("latin-1")
    what = f"{scope['method']} {path[: MOST_CHARS // 2]}{'?' if query else ''}{query}"
    if not (path.startswith("/soma/") or steers(path)):
        wishes = [
            f"{name.decode()}={value.decode('latin-1')}" for name, value in scope["headers"] if name in WISHES
        ]
        if not (wishes and caller.admin):
            return None
        what = " ".join((what, *wishes))
    return Order(caller.told, what[:MOST_CHARS], logs.request_id.get())


def _trail(scope: Scope) -> AuditTrail:
    trail: AuditTrail = scope["app"].state.soma_audit
    return trail
