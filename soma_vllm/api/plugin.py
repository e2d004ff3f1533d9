"""The `soma` endpoint plugin of vLLM: our routes replace vLLM's of the same paths, behind our access control.

vLLM builds plugins without arguments, passes them the application, then initialises them with the server's
parsed arguments, where soma-serve puts its host under `HOST`. Without a host, as in a plain vLLM that names
this plugin, start-up fails.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from soma_vllm.api import adapter_routes, admin, chat, readiness
from soma_vllm.api.auth.access import AccessControl
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.api.draining import Draining, DrainingRequests
from soma_vllm.api.error_responses import http_failed
from soma_vllm.api.readiness import Readiness
from soma_vllm.api.request_id import RequestId
from soma_vllm.api.responses import routes as responses_routes
from soma_vllm.api.route_filter import close_unlisted_routes
from soma_vllm.errors import PreflightError
from soma_vllm.maintenance.adapter_eviction import AdapterEvictor
from soma_vllm.maintenance.session_admin import SessionAdmin
from soma_vllm.scheduler.dispatcher import Dispatcher

logger = logging.getLogger(__name__)

HOST = "soma_host"
"""Attribute of the server's arguments under which soma-serve puts its host."""


class Services(Protocol):
    """What the routes need of `app.build.SomaServices`."""

    @property
    def dispatcher(self) -> Dispatcher: ...
    @property
    def session_admin(self) -> SessionAdmin: ...
    @property
    def evictor(self) -> AdapterEvictor: ...


class Host(Protocol):
    """soma-serve, as the plugin sees it."""

    quotas: Quotas
    draining: Draining
    readiness: Readiness
    extra_routes: bool
    """Whether vLLM's further routes are served too."""

    async def begin(self, engine_client: Any, state: Any) -> Services:
        """Called when vLLM's engine and serving objects are ready; returns when requests can be dispatched."""
        ...

    def models(self) -> list[str]:
        """Names of models that a request may ask for."""
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
        for part in (chat, responses_routes, admin, adapter_routes, readiness):
            app.include_router(part.router)
        self._app = app
        self._ours = [route for route in app.routes if id(route) not in theirs]
        # vLLM handles FastAPI's own subclass only.
        app.add_exception_handler(HTTPException, http_failed)
        host = _host(app.state.args)
        app.add_middleware(DrainingRequests, draining=host.draining)
        app.add_middleware(AccessControl, quotas=host.quotas)
        app.add_middleware(RequestId)  # added last, so outermost: refusals have an id too

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the services; the application is complete now, so close the routes that are not served.

        Raises:
            PreflightError: this vLLM was not started by soma-serve, or a service did not start.
        """
        host = _host(args)
        if self._app is not None and not host.extra_routes:
            closed = close_unlisted_routes(self._app, self._ours)
            logger.info(
                "vLLM's routes answer 404 (server.extra_routes opens them): %s", ", ".join(sorted(closed))
            )
        state.soma_host = host
        state.soma_readiness = host.readiness
        services = await host.begin(engine_client, state)
        state.soma = services.dispatcher
        state.soma_session_admin = services.session_admin
        state.soma_evictor = services.evictor


def _host(args: Namespace) -> Host:
    host: Host | None = getattr(args, HOST, None)
    if host is None:
        raise PreflightError("the soma endpoint plugin runs inside soma-serve; start that instead of vLLM")
    return host
