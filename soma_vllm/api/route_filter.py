"""Closes the routes of vLLM that are neither replaced by ours nor listed here.

Guarantees: a route that runs a model is dispatched and counted as ours is, or closed; a route that a later vLLM
adds is closed until it is listed here. A closed route answers 404 and not 403, because no key opens it.
"""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute

from soma_vllm.api.error_responses import failure

KEPT = frozenset(
    {
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
        "/openapi.json",
        "/health",
        "/ping",
        "/static",
        "/load",
        "/metrics",
    }
)
"""Routes of vLLM that stay open: none of them generates, or changes what all tenants share."""


def close_unlisted_routes(app: FastAPI, ours: Iterable[BaseRoute]) -> list[str]:
    """Close every route that is neither ours nor kept; returns their paths.

    To be called when the application is complete: vLLM registers some routes after its plugins' own.
    """
    own = {id(route) for route in ours}
    routes: list[BaseRoute] = []
    closed: list[str] = []
    for route in app.router.routes:
        if id(route) in own or not isinstance(route, Route | Mount | WebSocketRoute) or route.path in KEPT:
            routes.append(route)
            continue
        closed.append(route.path)
        if isinstance(route, Route):
            routes.append(Route(route.path, not_served, methods=route.methods, include_in_schema=False))
    app.router.routes[:] = routes
    app.openapi_schema = None
    return closed


async def not_served(request: Request) -> Response:
    """The answer of a closed route."""
    message = (
        f"{request.method} {request.url.path} is closed; server.extra_routes: true opens vLLM's further "
        "routes, which run the surrogate without sessions and without token limits"
    )
    return failure(HTTPStatus.NOT_FOUND, message)
