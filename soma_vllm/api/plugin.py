"""The `soma` endpoint plugin of vLLM: our routes replace vLLM's of the same paths, behind our access control.

vLLM builds plugins without arguments, passes them the application, then initialises them with the server's
parsed arguments, where soma-serve puts its host under `HOST`. Without a host, as in a plain vLLM that names
this plugin, start-up fails.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from soma_vllm.api import adapter_routes, admin, anthropic_messages, audit, chat, readiness, server_info
from soma_vllm.api.auth.access import AccessControl
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.api.cors import open_to_pages
from soma_vllm.api.draining import Draining, DrainingRequests
from soma_vllm.api.error_responses import http_failed
from soma_vllm.api.readiness import Readiness
from soma_vllm.api.request_id import RequestId
from soma_vllm.api.responses import conversations
from soma_vllm.api.responses import routes as responses_routes
from soma_vllm.api.responses.background import BackgroundResponses
from soma_vllm.api.responses.stored import ObjectRecord
from soma_vllm.api.route_filter import close_unlisted_routes
from soma_vllm.config import Server
from soma_vllm.errors import PreflightError
from soma_vllm.maintenance.adapter_eviction import AdapterEvictor
from soma_vllm.maintenance.session_admin import SessionAdmin
from soma_vllm.scheduler.dispatcher import Dispatcher
from soma_vllm.sessions.registry import SessionRegistry

logger = logging.getLogger(__name__)

HOST = "soma_host"
"""Attribute of the server's arguments under which soma-serve puts its host."""


PARTS = (
    chat,
    anthropic_messages,
    server_info,
    readiness,
    responses_routes,
    conversations,
    admin,
    adapter_routes,
    audit,
)
"""Modules with a router of ours."""


class Services(Protocol):
    """What the routes need of `app.build.SomaServices`."""

    @property
    def dispatcher(self) -> Dispatcher: ...
    @property
    def registry(self) -> SessionRegistry: ...
    @property
    def session_admin(self) -> SessionAdmin: ...
    @property
    def evictor(self) -> AdapterEvictor: ...


class Host(Protocol):
    """soma-serve, as the plugin sees it."""

    quotas: Quotas
    draining: Draining
    readiness: Readiness
    server: Server
    """How it serves."""
    started_at: float
    """Unix time, seconds."""

    async def begin(self, engine_client: Any, state: Any) -> Services:
        """Called when vLLM's engine and serving objects are ready; returns when requests can be dispatched."""
        ...

    def models(self) -> Mapping[str, int | None]:
        """Names that a request may ask for (the dispatch, the original, the surrogate) and the longest prompt
        and answer of each, tokens; None where that is unknown."""
        ...

    async def original_tokenizer(
        self, path: str, body: Mapping[str, Any], required: bool
    ) -> Mapping[str, Any] | None:
        """What the original answers at `tokenize` or `detokenize`; None where it shows no tokenizer.

        Raises:
            Unprocessable: it shows none, and that is required.
            EngineError: it did not answer, or found the request wrong.
        """
        ...


class SomaEndpointPlugin:
    """`vllm.endpoint_plugins` entry point."""

    name = "soma"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self._app: FastAPI | None = None
        self._ours: list[BaseRoute] = []

    def attach_router(self, app: FastAPI) -> None:
        """Register our routes, which replace vLLM's of the same paths, and the middleware."""
        theirs = {id(route) for route in app.routes}
        for part in PARTS:
            app.include_router(part.router)
        app.title, app.version = server_info.TITLE, server_info.VERSION
        self._app = app
        self._ours = [route for route in app.routes if id(route) not in theirs]
        # vLLM handles FastAPI's own subclass only.
        app.add_exception_handler(HTTPException, http_failed)
        host = _host(app.state.args)
        app.add_middleware(DrainingRequests, draining=host.draining)
        app.add_middleware(audit.AuditedOrders)
        app.add_middleware(AccessControl, quotas=host.quotas)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the services; the application is complete now, so close the routes that are not served.

        Raises:
            PreflightError: this vLLM was not started by soma-serve, or a service did not start.
        """
        host = _host(args)
        server: Server = host.server
        if self._app is not None:
            open_to_pages(self._app, server.cors)
            self._app.user_middleware.insert(0, Middleware(RequestId))  # outermost: refusals have an id too
            self._app.middleware_stack = None  # vLLM has built one; the first request builds another
            if not server.extra_routes:
                closed = close_unlisted_routes(self._app, self._ours)
                logger.info(
                    "vLLM's routes answer 404 (server.extra_routes opens them): %s", ", ".join(sorted(closed))
                )
        state.soma_host = host
        state.soma_readiness = host.readiness
        services = await host.begin(engine_client, state)
        state.soma = services.dispatcher
        state.soma_audit = services.registry.store.audit
        state.soma_objects = ObjectRecord(services.registry)
        state.soma_background = BackgroundResponses(state.soma_objects)
        services.registry.erasure.watch(state.soma_background)
        state.soma_session_admin = services.session_admin
        state.soma_evictor = services.evictor


def _host(args: Namespace) -> Host:
    host: Host | None = getattr(args, HOST, None)
    if host is None:
        raise PreflightError("the soma endpoint plugin runs inside soma-serve; start that instead of vLLM")
    return host
