"""ASGI middleware in front of every route, vLLM's included: authentication, quotas, and the size of bodies.

Guarantees: with keys in use a path is closed unless it is named here, and routes that control the server need
the admin key; a path that is not there is a 404, with and without a key; a refusal is an OpenAI error and never
a 500, whatever the headers hold; bodies and replies pass through piece by piece, nothing is buffered; a request
refused for its key or its declared size counts against no limit.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soma_vllm.api.auth.quotas import Caller, Quotas, Refusal
from soma_vllm.api.error_responses import failed, no_such_path
from soma_vllm.api.route_filter import not_served
from soma_vllm.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    NotFound,
    SomaError,
    StoreUnavailable,
    Unauthorized,
)
from soma_vllm.logs import bind

CALLER = "soma_caller"
"""Key of the `Caller` in the state of the ASGI scope. Requests to open paths have none."""

MIB = 1024 * 1024
MAX_AUTHORIZATION = 4096
"""Longest Authorization header, bytes."""

OPEN = frozenset(
    {
        "/",
        "/static/swagger-ui-bundle.js",
        "/static/swagger-ui.css",
        "/health",
        "/ready",
        "/ping",
        "/version",
        "/metrics",
        "/metrics/",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
    }
)
"""Paths that need no key: they reveal nothing about dialogues."""

KEYED = frozenset({"/tokenize", "/detokenize", "/invocations", "/generative_scoring", "/load"})
KEYED_BELOW = ("/v1/", "/v2/", "/inference/", "/cohere/", "/soma/")
"""Paths for every known key. All others control the server (scale, profile, pause) and need the admin key."""

STEERING = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests"})
"""These need the admin key too, although they are among the others: they change what all tenants share."""

MESSAGES = "/v1/messages"
"""Where Anthropic's clients ask."""

CHEAP = frozenset({"/tokenize", "/detokenize", f"{MESSAGES}/count_tokens"})
CHEAP_BELOW = ("/soma/", "/v1/conversations")
"""Requests that run no model, but cost processor time or the database's: they count as requests, and need no
tokens."""

NEEDS_ADMIN = "found an API key without this right; expected the admin key"

REASONS: tuple[tuple[type[SomaError], Refusal], ...] = (
    (Unauthorized, Refusal.KEY),
    (Forbidden, Refusal.ADMIN),
    (BodyTooLarge, Refusal.BODY),
    (BadRequest, Refusal.MALFORMED),
    (StoreUnavailable, Refusal.STORE),
)
"""How refusals are counted here; `Quotas` counts what it refuses itself."""


class AccessControl:
    """The middleware: `app.add_middleware(AccessControl, quotas=quotas)`."""

    def __init__(self, app: ASGIApp, quotas: Quotas) -> None:
        self._app = app
        self._quotas = quotas
        self._max_body = quotas.access.max_body_mib * MIB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        _take_anthropic_key(scope)
        try:
            caller = await self._checked(scope)
        except SomaError as error:
            if isinstance(error, Unauthorized | Forbidden) and not is_there(scope):
                # Sends nobody looking for another key. What exists is no secret: /openapi.json is open.
                error = NotFound(no_such_path(scope["method"], scope["path"]))
            self._count(error)
            await (_answer(error, send) if scope["type"] == "http" else _hang_up(send))
            return
        exchange = Exchange(receive, send, self._max_body, self._count)
        try:
            with bind(tenant=None if caller is None else caller.tenant):
                await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            # The application sees a client that left; in fact its body was refused.
            if not exchange.refused:
                raise

    async def _checked(self, scope: Scope) -> Caller | None:
        """The caller, whom the scope's state now holds too; None on an open path.

        Raises:
            SomaError: the request is not let through.
        """
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        caller = None
        if path not in OPEN:
            caller = await self._quotas.caller(authorization_of(scope))
            if self._quotas.needs_keys and not caller.admin and steers(path):
                raise Forbidden(NEEDS_ADMIN)
        length = declared_length(scope)
        if length is not None and length > self._max_body:
            raise too_large(self._max_body)
        if caller is not None:
            if generates(scope, path):
                self._quotas.admit(caller)
            elif counts(scope, path) and not caller.admin:
                self._quotas.admit(caller, needs_tokens=False)
            scope.setdefault("state", {})[CALLER] = caller
        return caller

    def _count(self, error: SomaError) -> None:
        for kind, reason in REASONS:
            if isinstance(error, kind):
                self._quotas.refused(reason)
                return


class Exchange:
    """Passes a request's body and its response on, and ends both where the body is too large."""

    def __init__(self, receive: Receive, send: Send, max_body: int, count: Callable[[SomaError], None]) -> None:
        self._receive = receive
        self._send = send
        self._max_body = max_body
        self._count = count
        self._read = 0
        self._started = False
        self.refused = False
        """True once the refusal was sent; the application's own answer is then dropped."""

    async def receive(self) -> Message:
        """The next piece of the body; a disconnect where the body is too large."""
        if self._read <= self._max_body:
            message = await self._receive()
            if message["type"] == "http.request":
                self._read += len(message.get("body", b""))
            if self._read <= self._max_body:
                return message
            await self._refuse(too_large(self._max_body))
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass the application's next piece on."""
        if not self.refused:
            self._started = True
            await self._send(message)

    async def _refuse(self, error: BodyTooLarge) -> None:
        self._count(error)
        if not self._started:
            self.refused = True
            await _answer(error, self._send)


def authorization_of(scope: Scope) -> str | None:
    """The Authorization header; None without one.

    Raises:
        BadRequest: there are several, or it cannot be one. What it holds is not quoted.
    """
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if not found:
        return None
    if len(found) > 1:
        raise BadRequest(f"Authorization: found {len(found)} headers; expected one")
    (value,) = found
    if len(value) > MAX_AUTHORIZATION:
        raise BadRequest(f"Authorization: found {len(value)} bytes; expected at most {MAX_AUTHORIZATION}")
    if any(byte < 0x20 or byte == 0x7F for byte in value):
        raise BadRequest("Authorization: found control characters; expected printable text")
    text: str = value.decode("latin-1")
    return text


def _take_anthropic_key(scope: Scope) -> None:
    """Anthropic's clients send their key in a header of their own; from here on it is a bearer token."""
    names = [name for name, _ in scope["headers"]]
    if scope["path"].startswith(MESSAGES) and b"authorization" not in names:
        keys = [value for name, value in scope["headers"] if name == b"x-api-key" and value]
        added = [(b"authorization", b"Bearer " + key) for key in keys]
        scope["headers"] = [*scope["headers"], *added]


def is_there(scope: Scope) -> bool:
    """Whether the application serves anything at a request's path, by whatever method; True outside HTTP."""
    if scope["type"] != "http" or "app" not in scope:
        return True
    routes = (
        route for route in scope["app"].router.routes if getattr(route, "endpoint", None) is not not_served
    )
    return any(route.matches(scope)[0] is not Match.NONE for route in routes)


def declared_length(scope: Scope) -> int | None:
    """The body's length as its header declares it; None where it does not, or not as a number."""
    for name, value in scope["headers"]:
        # Twenty digits are more than any limit, and int() refuses some thousands of them.
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return None


def caller_of(request: Request) -> Caller:
    """The caller of a request that the middleware let through."""
    caller: Caller = request.scope["state"][CALLER]
    return caller


def require_admin(request: Request) -> None:
    """Check that a request carries the admin key.

    Raises:
        Forbidden: it does not.
    """
    if not caller_of(request).admin:
        raise Forbidden(NEEDS_ADMIN)


def steers(path: str) -> bool:
    """Whether a path needs the admin key."""
    return path in STEERING or not (path in KEYED or path.startswith(KEYED_BELOW))


def generates(scope: Scope, path: str) -> bool:
    """Whether a request may keep a model busy: any POST, but for cheap ones, and any web socket."""
    if scope["type"] == "websocket":
        return True
    return scope["method"] == "POST" and not path.endswith("/cancel") and not is_cheap(path)


def counts(scope: Scope, path: str) -> bool:
    """Whether a request that runs no model counts: a cheap POST, and anything asked of `/soma/`."""
    return is_cheap(path) and (scope["method"] == "POST" or path.startswith("/soma/"))


def is_cheap(path: str) -> bool:
    """Whether no request to a path runs a model."""
    return path in CHEAP or path.startswith(CHEAP_BELOW)


def too_large(most: int) -> BodyTooLarge:
    """The refusal of a body longer than `most` bytes."""
    return BodyTooLarge(f"body: found more than {most // MIB} MiB; expected at most that")


async def _answer(error: SomaError, send: Send) -> None:
    response = failed(error)
    start = {"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers}
    await send(start)
    await send({"type": "http.response.body", "body": response.body})


async def _hang_up(send: Send) -> None:
    """Refuse a web socket before it is opened: servers answer 403."""
    await send({"type": "websocket.close", "code": 1008})
