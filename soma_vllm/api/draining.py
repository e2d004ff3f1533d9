"""Ending without cutting anybody off: on SIGTERM or SIGINT no new request is taken, and those under way finish.

Guarantees: while it drains, the server listens, answers new requests 503 with `Retry-After` and is not ready,
so that a load balancer moves on; it ends as soon as the last request is over, at the latest after `limit_s`; a
second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from soma_vllm.api.error_responses import failed
from soma_vllm.errors import EngineUnavailable

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
RETRY_S = 1.0
"""Seconds; a hint for clients whose request another replica may take."""


class Draining:
    """Counts requests under way, and waits for them when the server is to end."""

    def __init__(self, limit_s: float, say: Callable[[str], None]) -> None:
        self._limit_s = limit_s
        self._say = say
        self._task: asyncio.Task[None] | None = None
        self.in_flight = 0
        """POST requests under way."""

    @property
    def active(self) -> bool:
        """Whether the server is about to end."""
        return self._task is not None

    def handle_signals(self, http_server: Any) -> None:
        """Take the signals over from vLLM, which would cut off every stream. Call it in the running loop.

        `http_server` is uvicorn's, which ends when `should_exit` is set.
        """
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self.on_signal, http_server)

    def on_signal(self, http_server: Any) -> None:
        """Begin to drain; the second time, end."""
        if self._task is None:
            self._say(f"draining   {self.in_flight} requests are under way (at most {self._limit_s:g} s)")
            self._task = asyncio.create_task(self._drain(http_server), name="soma-drain")
        else:
            http_server.should_exit = http_server.force_exit = True

    async def _drain(self, http_server: Any) -> None:
        try:
            async with asyncio.timeout(self._limit_s):
                while self.in_flight:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            logger.warning("%d requests were cut off after %g s of draining", self.in_flight, self._limit_s)
            http_server.force_exit = True
        http_server.should_exit = True


class DrainingRequests:
    """ASGI middleware: `app.add_middleware(DrainingRequests, draining=draining)`."""

    def __init__(self, app: ASGIApp, draining: Draining) -> None:
        self._app = app
        self._draining = draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it where the server is about to end."""
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._draining.active:
            await failed(EngineUnavailable("this server is about to end", RETRY_S))(scope, receive, send)
            return
        self._draining.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._draining.in_flight -= 1
