"""HTTP clients of the study: every request on a connection of its own.

A server closes a connection that has been idle for a while (vLLM's after 5 seconds), and a client that sends a
request at that very moment finds it gone. An hour of measurements would be lost to one such race. A new
connection on the same machine takes a tenth of a millisecond, on both sides of every comparison.
"""

from __future__ import annotations

from typing import Any

import httpx

NOT_KEPT = httpx.Limits(max_keepalive_connections=0)


def fresh_client(**settings: Any) -> httpx.AsyncClient:
    """A client that keeps no connection open between requests, and asks no proxy."""
    return httpx.AsyncClient(limits=NOT_KEPT, trust_env=False, **settings)
