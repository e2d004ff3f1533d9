"""Which web pages may ask: the CORS headers, by `server.cors`.

Guarantees: a browser's preflight is answered before a key is asked for, and refusals have the headers too, so
that a page reads why; scripts see the headers of a reply that say who answered. vLLM's own middleware is
replaced; its `--allowed-origins`, where given in `surrogate.extra_args`, count beside ours.
"""

from __future__ import annotations

import re

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from soma_vllm.config import Cors

EXPOSED = (
    "X-SOMA-Session",
    "X-SOMA-Engine",
    "X-SOMA-Adapter",
    "X-SOMA-Phase",
    "X-SOMA-Reason",
    "X-SOMA-Branch",
    "X-SOMA-History",
    "X-Request-Id",
    "Retry-After",
)
"""Headers of a reply that scripts may read."""


def open_to_pages(app: FastAPI, cors: Cors) -> None:
    """Let the configured pages ask, before any other middleware is passed; to be called before a request
    comes."""
    theirs = getattr(getattr(app.state, "args", None), "allowed_origins", None) or ()
    stack = [each for each in app.user_middleware if each.cls is not CORSMiddleware]  # type: ignore[comparison-overlap]
    if origins := [*cors.allow_origins, *theirs]:
        everyone = "*" in origins
        ours = Middleware(
            CORSMiddleware,
            allow_origins=["*"] if everyone else [],
            allow_origin_regex=None if everyone else pattern(origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
            max_age=cors.max_age_s,
        )
        stack.insert(0, ours)
    app.user_middleware[:] = stack


def pattern(origins: list[str]) -> str:
    """The expression that an allowed origin matches as a whole."""
    spelt = (re.escape(origin.rstrip("/")) for origin in origins)
    parts = (origin.replace(r":\*", ":[0-9]+").replace(r"\*", "[^/:]*") for origin in spelt)
    return "|".join(f"(?:{origin})" for origin in parts)
