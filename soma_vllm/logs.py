"""Which request, session and tenant a log line belongs to.

Guarantees: ids set by `bind` hold for the task that set them and for the tasks that it starts, and are reset
when the block ends; a value from a client cannot break a log line or add a field to it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

request_id: ContextVar[str | None] = ContextVar("soma_request_id", default=None)
"""The request's `X-Request-Id`."""

session: ContextVar[str | None] = ContextVar("soma_session", default=None)
"""The session's id, within its tenant."""

tenant: ContextVar[str | None] = ContextVar("soma_tenant", default=None)
"""The tenant: a digest of the API key, never the key."""

_IDS = {"session": session, "tenant": tenant, "request_id": request_id}
"""In their order in a log line."""


@contextmanager
def bind(**ids: str | None) -> Iterator[None]:
    """Set some of `request_id`, `session` and `tenant` for the block; None clears one.

    Raises:
        TypeError: an id is none of these.
    """
    if unknown := ids.keys() - _IDS.keys():
        raise TypeError(f"found {', '.join(sorted(unknown))}; expected some of {', '.join(_IDS)}")
    tokens = [(_IDS[name], _IDS[name].set(value)) for name, value in ids.items()]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)


class LogContext(logging.Filter):
    """Puts ` session=… tenant=… request=…` on each record as `record.context`: those that are set, else ""."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record pass."""
        found = ((name.removesuffix("_id"), variable.get()) for name, variable in _IDS.items())
        record.context = "".join(f" {name}={_shown(value)}" for name, value in found if value is not None)
        return True


def _shown(value: str) -> str:
    """The value as one word: quoted and escaped where it is not one."""
    plain = value.isprintable() and value and not set(value) & set(' "=')
    return value if plain else json.dumps(value)
