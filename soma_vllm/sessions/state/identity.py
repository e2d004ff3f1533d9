"""Which session a request belongs to: an explicit id, else the transcript itself.

Guarantees: a session is looked up only inside its tenant; an id is refused early when it cannot be one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from soma_vllm.config.serving import Sessions
from soma_vllm.errors import BadRequest

MAX_ID_LENGTH = 256
DEFAULTS = Sessions()


def tenant_of(authorization: str | None) -> str:
    """Digest of the bearer token, or "public" without one. Tokens themselves are never stored."""
    token = bearer(authorization)
    if token is None:
        return "public"
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def bearer(authorization: str | None) -> str | None:
    """The bearer token of an Authorization header; None without one."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def explicit_id(headers: Mapping[str, str], body: Mapping[str, Any], names: Sessions = DEFAULTS) -> str | None:
    """The id that a client gave in one of the configured headers, else in one of the body's fields, else None.

    Raises:
        BadRequest: the id is empty, too long, or holds control characters.
    """
    sent = (_as_utf8(headers.get(name.lower())) for name in names.headers)
    found: Any = next(filter(None, sent), None)
    if found is None:
        fields = (_field(body, name) for name in names.body_fields)
        found = next((value for value in fields if value is not None), None)
    if found is None:
        return None
    if not isinstance(found, str) or not found.strip():
        raise BadRequest(f"session id: found {type(found).__name__}; expected non-empty text", "session_id")
    if len(found) > MAX_ID_LENGTH:
        raise BadRequest(
            f"session id: found {len(found)} characters; expected at most {MAX_ID_LENGTH}", "session_id"
        )
    if not found.isprintable():
        raise BadRequest("session id: found control characters; expected printable text", "session_id")
    return found


def _field(body: Mapping[str, Any], name: str) -> Any:
    """A field of the body; None without it."""
    found: Any = body
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _as_utf8(header: str | None) -> str | None:
    """A header's text: servers hand it over as Latin-1, clients send UTF-8."""
    if header is None:
        return None
    try:
        return header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header
