"""ASGI middleware: every request has an id, which its response repeats and its log lines name.

Guarantees: a client's own `X-Request-Id` is kept where it is printable ASCII of at most 128 characters, and is
replaced by a random one otherwise; a response has the header once. The answer to an uncaught exception is
written by Starlette outside all middleware and has none.
"""

from __future__ import annotations

import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soma_vllm.logs import bind

HEADER = "X-Request-Id"
MAX_LENGTH = 128


class RequestId:
    """The middleware: `app.add_middleware(RequestId)`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request under its id."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = given_id(scope) or uuid.uuid4().hex

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with bind(request_id=request_id):
            await self._app(scope, receive, send_with_id)


def given_id(scope: Scope) -> str | None:
    """The id that the client sent; None without one, with several, or with one that is not accepted."""
    found = [value.strip() for name, value in scope["headers"] if name == HEADER.lower().encode()]
    if len(found) != 1 or not 1 <= len(found[0]) <= MAX_LENGTH:
        return None
    text: str = found[0].decode("latin-1")
    return text if text.isascii() and text.isprintable() else None
