"""ASGI middleware in front of every route, vLLM's included: who may ask, how often, and how large a body.

Guarantees: with keys in use a path is closed unless it is named here, and routes that steer the server are the
admin's; a refusal is an OpenAI error and never a 500, whatever the headers hold; bodies and replies pass
through piece by piece, nothing is buffered; a request refused for its key or its declared size counts against
no limit.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from soma_vllm.api.auth.quotas import Quotas, Refusal
from soma_vllm.api.error_responses import failed
from soma_vllm.errors import (
    BadRequest,
    BodyTooLarge,
    Forbidden,
    SomaError,
    StoreUnavailable,
    Unauthorized,
)

CALLER = "soma_caller"
"""Key of the `Caller` in the state of the ASGI scope. Requests to open paths have none."""

MIB = 1024 * 1024
MAX_AUTHORIZATION = 4096
"""Longest Authorization header, bytes."""

OPEN = frozenset(
    {
        "/health",
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
"""Paths that need no key: what is there says nothing about anybody's dialogues."""

KEYED = frozenset({"/tokenize", "/detokenize", "/invocations", "/generative_scoring", "/load"})
KEYED_BELOW = ("/v1/", "/v2/", "/inference/", "/cohere/", "/soma/")
"""Paths for every known key. All others steer the server (scale, profile, pause it) and need the admin key."""

STEERING = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests"})
"""The admin's as well, although they stand among the others: they reach into what all tenants share."""

UNCOUNTED = frozenset({"/tokenize", "/detokenize"})
"""POST requests that ask no model anything."""

REASONS: tuple[tuple[type[SomaError], Refusal], ...] = (
    (Unauthorized, Refusal.KEY),
    (Forbidden, Refusal.ADMIN),
    (BodyTooLarge, Refusal.BODY),
    (BadRequest, Refusal.MALFORMED),
    (StoreUnavailable, Refusal.STORE),
)
"""How refusals are counted here; `Quotas` counts what it refuses itself."""


class AccessControl:
    """The middleware: `app.add_middleware(AccessControl, allowances=allowances)`."""

    def __init__(self, app: ASGIApp, quotas: Quotas) -> None:
        self._app = app
        self._quotas = quotas
        self._max_body = quotas.access.max_body_mib * MIB

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it with an error."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            await self._check(scope)
        except SomaError as error:
            self._count(error)
            await (_answer(error, send) if scope["type"] == "http" else _hang_up(send))
            return
        exchange = Exchange(receive, send, self._max_body, self._count)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            # To the application the client has left; in truth its body was refused.
            if not exchange.refused:
                raise

    async def _check(self, scope: Scope) -> None:
        """Leave the caller in the scope.

        Raises:
            SomaError: the request is not to be let through.
        """
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in OPEN:
            self._check_length(scope)
            return
        caller = await self._quotas.caller(authorization_of(scope))
        if self._quotas.needs_keys and not caller.admin and steers(path):
            raise Forbidden("this API key may not steer the server; expected the admin key")
        self._check_length(scope)
        if generates(scope, path):
            self._quotas.admit(caller)
        scope.setdefault("state", {})[CALLER] = caller

    def _check_length(self, scope: Scope) -> None:
        length = declared_length(scope)
        if length is not None and length > self._max_body:
            raise too_large(self._max_body)

    def _count(self, error: SomaError) -> None:
        for kind, reason in REASONS:
            if isinstance(error, kind):
                self._quotas.refused(reason)
                return


class Exchange:
    """A request's body on its way in, the response on its way out. A body that grows too large ends both."""

    def __init__(self, receive: Receive, send: Send, max_body: int, count: Callable[[SomaError], None]) -> None:
        self._receive = receive
        self._send = send
        self._max_body = max_body
        self._count = count
        self._read = 0
        self._started = False
        self.refused = False
        """True once the client was told that its body is too large; the application's own answer is dropped."""

    async def receive(self) -> Message:
        """The next piece; of a body that is too large, what the application gets when a client leaves."""
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


def declared_length(scope: Scope) -> int | None:
    """The body's length as its header declares it; None where it does not, or not as a number."""
    for name, value in scope["headers"]:
        # Twenty digits are more than any limit, and int() refuses some thousands of them.
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return None


def steers(path: str) -> bool:
    """Whether a path is the admin's alone."""
    return path in STEERING or not (path in KEYED or path.startswith(KEYED_BELOW))


def generates(scope: Scope, path: str) -> bool:
    """Whether a request counts: any POST that may keep a model busy, and any conversation over a web socket."""
    if scope["type"] == "websocket":
        return True
    asks = path not in UNCOUNTED and not path.startswith("/soma/") and not path.endswith("/cancel")
    return scope["method"] == "POST" and asks


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
