"""Errors as HTTP: OpenAI's shape, and which status each error of ours becomes.

Guarantees: every SomaError has an answer; whoever is told to come back is told when; a body is always UTF-8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

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
"""Hint for clients while the database is away."""

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
"""Status and `code` of each error; a special kind stands before the general one."""


def failure(
    status: HTTPStatus,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    code: str | None = None,
) -> JSONResponse:
    """An error in OpenAI's shape; `code` is the status' number where it has no name of its own."""
    kind = "".join(word.capitalize() for word in status.phrase.split()) + "Error"
    # What a message quotes of a request may hold half a surrogate pair, which UTF-8 cannot.
    message = message.encode("utf-8", "backslashreplace").decode()
    error = {"message": message, "type": kind, "param": param, "code": int(status) if code is None else code}
    return JSONResponse(
        {"error": error}, status_code=status, headers=None if headers is None else dict(headers)
    )


def failed(error: SomaError) -> JSONResponse:
    """The response to a request that ended in `error`. An engine's own refusal goes out unchanged."""
    if isinstance(error, EngineRefused):
        return JSONResponse(error.body, status_code=error.status)
    status, code = next((status, code) for kind, status, code in STATUS if isinstance(error, kind))
    param = error.param if isinstance(error, BadRequest) else None
    return failure(status, str(error), param, _headers(error), code)


async def http_failed(_: Request, error: Exception) -> JSONResponse:
    """Starlette's own errors in OpenAI's shape: no such path, no such method, a body that is not JSON."""
    assert isinstance(error, HTTPException)
    return failure(HTTPStatus(error.status_code), str(error.detail), headers=error.headers)


def _headers(error: SomaError) -> dict[str, str] | None:
    if isinstance(error, Unauthorized):
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, TooManyRequests | EngineUnavailable):
        return {"Retry-After": whole_seconds(error.retry_after)}
    if isinstance(error, StoreUnavailable):
        return {"Retry-After": whole_seconds(STORE_RETRY_S)}
    return None


def whole_seconds(seconds: float) -> str:
    """A wait as `Retry-After` gives it: whole seconds, never too short."""
    # The rounding takes off what floating point adds: a wait of 60 s is not one of 61.
    return str(math.ceil(round(seconds, 6)))
