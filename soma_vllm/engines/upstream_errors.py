"""Errors of OpenAI-compatible endpoints, in whatever shape, as errors of this package.

Guarantees: the body of an `EngineRefused` has OpenAI's shape, holds text that the endpoint wrote for clients,
and names neither its hosts nor keys, accounts and addresses of the operator's; a wait is a finite number of
seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from soma_vllm.errors import EngineDenied, EngineError, EngineRefused, EngineUnavailable

RETRY_S = 5.0
"""Wait that a client is told where the endpoint names none, seconds."""

MOST_RETRY_S = 86_400.0
MOST_CHARS = 2000
"""Of an endpoint's message."""

_OUR_ACCOUNT = (401, 402, 403, 407)
"""The client cannot correct these, and the body may quote a part of our key."""

_PASSING = (408, 425)
"""Below 500, and yet no fault of the request."""

_MESSAGE_FIELDS = ("message", "msg", "detail", "error_description", "error", "errors", "reason", "title")
_STATUS_OF_TYPE = {
    "invalid_request_error": 400,
    "badrequesterror": 400,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "ratelimiterror": 429,
    "toomanyrequests": 429,
}

_PRIVATE = re.compile(
    r"\b\w+://\S+"
    r"|\b(?:sk|pk)[-_][\w*.-]{4,}"
    r"|\b(?:org|proj|acct|user|key|req)[-_](?=[\w*.-]*\d)[\w*.-]{4,}"
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
    r"|\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"
    r"|\b(?:[\w-]+\.)+(?:com|net|org|io|ai|dev|app|cloud|internal|local|svc|eu|cn|de)\b(?::\d+)?",
    re.IGNORECASE,
)
"""URLs, keys, accounts, mail addresses and hosts."""


def failure(
    status: int, found: object, headers: Mapping[str, str] | None = None, source: str = ""
) -> EngineError:
    """What an answer with a status of 400 or more means. `found` is its body's JSON, None where it is none;
    `source` says whose key was sent."""
    wait = retry_after(headers or {})
    if status in _OUR_ACCOUNT:
        return EngineDenied(f"the original answered with status {status} to {source or 'our requests'}")
    if status in _PASSING or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return EngineUnavailable(
            f"the original answered with status {status}", retry_after=RETRY_S if wait is None else wait
        )
    return EngineRefused(status, {"error": openai_error(found, status)}, retry_after=wait)


def failure_in(found: Mapping[str, Any], event: str = "message") -> EngineError | None:
    """The failure that a 200's body, or an event of its stream, reports; None where it reports none."""
    error = found.get("error")
    if not error and event != "error" and (found.get("object") != "error" or "choices" in found):
        return None
    status = _status(error) or _status(found) or HTTPStatus.BAD_GATEWAY
    if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return failure(status, found)
    # Its own words may quote the request, and errors are logged.
    return EngineUnavailable("the original reported an error in its answer")


def openai_error(found: object, status: int) -> dict[str, Any]:
    """An endpoint's error in OpenAI's shape: message, type, param and code, and nothing else."""
    error = found.get("error") if isinstance(found, Mapping) else None
    fields = next((one for one in (error, found) if isinstance(one, Mapping)), {})
    message = _message(error) or _message(found) or f"the original answered with status {status}"
    code = fields.get("code")
    return {
        "message": _PRIVATE.sub("[removed]", message)[:MOST_CHARS],
        "type": _word(fields.get("type")) or "upstream_error",
        "param": _word(fields.get("param")),
        "code": code if isinstance(code, int) and not isinstance(code, bool) else _word(code) or status,
    }


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a `Retry-After` asks to wait, given as a number or a date; None without a readable one."""
    text = headers.get("Retry-After", "").strip()
    try:
        seconds = float(text) if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text) else _until(text)
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MOST_RETRY_S)


def _until(date: str) -> float:
    at = parsedate_to_datetime(date)
    return ((at if at.tzinfo is not None else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()


def _status(error: object) -> int | None:
    """The HTTP status that an error names."""
    if not isinstance(error, Mapping):
        return None
    for name in ("status", "status_code", "code", "type"):
        value = error.get(name)
        if isinstance(value, str):
            value = int(value) if re.fullmatch(r"\d{3}", value) else _STATUS_OF_TYPE.get(value.lower())
        if isinstance(value, int) and not isinstance(value, bool) and 400 <= value < 600:
            return value
    return None


def _message(value: object, depth: int = 4) -> str:
    """The words of an error; "" where there are none. Markup is none."""
    if isinstance(value, str):
        return "" if value.lstrip().startswith("<") else value.strip()
    if not depth:
        return ""
    if isinstance(value, Mapping):
        words = next(filter(None, (_message(value.get(name), depth - 1) for name in _MESSAGE_FIELDS)), "")
        place = value.get("loc")
        return f"{'.'.join(map(str, place))}: {words}" if words and isinstance(place, list) else words
    if isinstance(value, list):
        return "; ".join(filter(None, (_message(one, depth - 1) for one in value[:5])))
    return ""


def _word(value: object) -> str | None:
    """A name such as a code or a field's; None for anything longer."""
    short = isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()
    return _PRIVATE.sub("[removed]", str(value)) if short else None
