"""Errors as HTTP: OpenAI's shape, and the status of each `SomaError`.

Guarantees: every SomaError has an answer; 429 and 503 responses carry Retry-After; a body is always UTF-8.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any

from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from soma_vllm.errors import (
    BadRequest,
    BodyTooLarge,
    EngineError,
    EngineRefused,
    EngineUnavailable,
    Forbidden,
    NoSuchModel,
    NotFound,
    SomaError,
    StoreUnavailable,
    TooManyRequests,
    Unauthorized,
    Unprocessable,
)

STORE_RETRY_S = 5.0
"""Seconds; a hint for clients while the database does not answer, or an engine refuses and names no wait."""

MOST_RETRY_S = 86_400.0

STATUS: tuple[tuple[type[SomaError], HTTPStatus, str | None], ...] = (
    (BodyTooLarge, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "body_too_large"),
    (NoSuchModel, HTTPStatus.NOT_FOUND, "model_not_found"),
    (Unprocessable, HTTPStatus.UNPROCESSABLE_ENTITY, None),
    (BadRequest, HTTPStatus.BAD_REQUEST, None),
    (Unauthorized, HTTPStatus.UNAUTHORIZED, "invalid_api_key"),
    (Forbidden, HTTPStatus.FORBIDDEN, "not_allowed"),
    (NotFound, HTTPStatus.NOT_FOUND, None),
    (TooManyRequests, HTTPStatus.TOO_MANY_REQUESTS, "rate_limit_exceeded"),
    (StoreUnavailable, HTTPStatus.SERVICE_UNAVAILABLE, None),
    (EngineUnavailable, HTTPStatus.SERVICE_UNAVAILABLE, None),
    (EngineError, HTTPStatus.BAD_GATEWAY, None),
    (SomaError, HTTPStatus.INTERNAL_SERVER_ERROR, None),
)
"""Status and `code` of each error; subclasses come before their bases."""


def failure(
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An error in OpenAI's shape; without a `code` of its own it is the number of the status."""
    kind = "".join(word.capitalize() for word in status.phrase.split()) + "Error"
    # Text that a message quotes from a request may hold half a surrogate pair, which UTF-8 cannot.
    message = message.encode("utf-8", "backslashreplace").decode()
    error = {"message": message, "type": kind, "param": param, "code": int(status) if code is None else code}
    return JSONResponse(
        {"error": error}, status_code=status, headers=None if headers is None else dict(headers)
    )


def failed(error: SomaError) -> JSONResponse:
    """The response to a request that failed with `error`. An engine's own refusal goes out as it is, but that
    a context which is too long has OpenAI's code for it: clients look for that, and vLLM has a number there."""
    if isinstance(error, EngineRefused):
        return JSONResponse(_with_code(error.body), status_code=error.status, headers=_headers(error))
    status, code = next((status, code) for kind, status, code in STATUS if isinstance(error, kind))
    param = error.param if isinstance(error, BadRequest) else None
    return failure(status, str(error), param, _headers(error), code)


TOO_LONG = re.compile(r"maximum (context|model) length")
"""In vLLM's words for a prompt, or a prompt and an answer, that do not fit."""


def _with_code(body: Mapping[str, Any]) -> Mapping[str, Any]:
    told = body.get("error")
    if not isinstance(told, Mapping) or not isinstance(told.get("code"), int | None):
        return body
    if not TOO_LONG.search(str(told.get("message"))):
        return body
    return {**body, "error": {**told, "code": "context_length_exceeded"}}


class TranslatingRoute(APIRoute):
    """A route whose SomaError is its answer, in OpenAI's shape."""

    def failed(self, error: SomaError) -> Response:
        """The answer to a request that failed with `error`."""
        return failed(error)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler of the route, and the translation around it."""
        handle = super().get_route_handler()

        async def translated(request: Request) -> Response:
            try:
                return await handle(request)
            except SomaError as error:
                return self.failed(error)

        return translated


def no_such_path(method: str, path: str) -> str:
    """What is said of a path that is not there."""
    return f"{method} {path[:200]}: found no such path; expected one of /docs, most of which begin with /v1"


async def http_failed(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own errors in OpenAI's shape: no such path, no such method, a body that is not JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND and error.detail == HTTPStatus.NOT_FOUND.phrase:
        return failure(HTTPStatus.NOT_FOUND, no_such_path(request.method, request.url.path))
    return failure(HTTPStatus(error.status_code), str(error.detail), headers=error.headers)


def _headers(error: SomaError) -> dict[str, str] | None:
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, TooManyRequests | EngineUnavailable):
        return {"Retry-After": whole_seconds(error.retry_after)}
    if isinstance(error, StoreUnavailable):
        return {"Retry-After": whole_seconds(STORE_RETRY_S)}
    if isinstance(error, EngineRefused):
        wait = STORE_RETRY_S if error.retry_after is None else error.retry_after
        named = error.retry_after is not None or error.status == HTTPStatus.TOO_MANY_REQUESTS
        return {"Retry-After": whole_seconds(wait)} if named else None
    return None


def whole_seconds(seconds: float) -> str:
    """A wait as `Retry-After` has it: whole seconds, rounded up, at most a day."""
    # Without the inner rounding a floating-point error would turn 60 s into 61.
    return str(math.ceil(round(min(seconds, MOST_RETRY_S), 6)))
