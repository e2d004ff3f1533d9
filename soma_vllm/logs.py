"""What a log line looks like, and which request, session and tenant it belongs to.

Guarantees: ids set by `bind` hold for the task that set them and for the tasks that it starts, and are reset
when the block ends; a value from a client cannot break a log line or add a field to it. As text, only the first
line of a record begins at the margin; as JSON, a record is one line, its traceback included. `configuration` is
plain JSON, so that vLLM, uvicorn and their child processes can be given the same one.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from soma_vllm.private import masked

request_id: ContextVar[str | None] = ContextVar("soma_request_id", default=None)
"""The request's `X-Request-Id`."""

session: ContextVar[str | None] = ContextVar("soma_session", default=None)
"""The session's id, within its tenant."""

tenant: ContextVar[str | None] = ContextVar("soma_tenant", default=None)
"""The tenant: a digest of the API key, never the key."""

_IDS = {"session": session, "tenant": tenant, "request_id": request_id}
"""In their order in a log line."""

OURS = "soma_vllm"
"""The logger above all of this package's."""

INDENT = "    "
"""Before each further line of a record that is written as text."""


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


class SessionName(Protocol):
    """A `types.SessionKey`."""

    @property
    def session(self) -> str: ...
    @property
    def tenant(self) -> str: ...


def bind_session(key: SessionName) -> AbstractContextManager[None]:
    """Set the session and its tenant for the block. A task that is created in it keeps them."""
    return bind(session=key.session, tenant=key.tenant)


class LogContext(logging.Filter):
    """Puts the ids that are set on each record: as `record.ids`, a dict by name, and as `record.context`, the
    text ` session=… tenant=… request=…` or ""."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Lets every record pass."""
        found = ((name.removesuffix("_id"), variable.get()) for name, variable in _IDS.items())
        ids = {name: value for name, value in found if value is not None}
        record.ids = ids
        record.context = "".join(f" {name}={as_word(value)}" for name, value in ids.items())
        return True


class TextFormatter(logging.Formatter):
    """`2026-11-27T20:00:00Z INFO scheduler.dispatcher: message session=… tenant=… request=…`; below, indented,
    further lines of the message, and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, without the newline at its end."""
        name = record.name.removeprefix(f"{OURS}.")
        context = getattr(record, "context", "")
        first, *rest = record.getMessage().splitlines() or [""]
        lines = [f"{_utc(record)} {record.levelname} {name}: {first}{context}", *rest]
        for further in filter(None, (_traceback(self, record), record.stack_info)):
            lines += further.splitlines()
        return masked(f"\n{INDENT}".join(lines))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, those of session, tenant and request that are set;
    `error`, the type's name, where the message quotes an error; and its `traceback`, where the text has one."""

    def format(self, record: logging.LogRecord) -> str:
        """One record, without the newline at its end."""
        line: dict[str, Any] = {
            "time": _utc(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "ids", {}),
        }
        if (error := _error(record)) is not None:
            line["error"] = error.__name__
        if (traceback := _traceback(self, record)) is not None:
            line["traceback"] = traceback
        return masked(json.dumps(line))


def configuration(log_format: str, level: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`: every logger of a server's process to stderr.

    Args:
        log_format: "text" or "json".
        level: the least level of this package's records; of others' it is WARNING.
    """
    formatter = {"text": TextFormatter, "json": JsonFormatter}[log_format]
    others = {"level": "WARNING", "handlers": ["stderr"], "propagate": False}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"ids": {"()": f"{__name__}.{LogContext.__name__}"}},
        "formatters": {log_format: {"()": f"{__name__}.{formatter.__name__}"}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "stream": "ext://sys.stderr",
                "filters": ["ids"],
                "formatter": log_format,
            }
        },
        # Levels are set one by one: Ray raises that of the root logger in the process that starts it.
        "loggers": {OURS: {**others, "level": level.upper()}, "vllm": others, "uvicorn": others},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
    }


def _utc(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))


def _error(record: logging.LogRecord) -> type[BaseException] | None:
    """The type of the error that a record is about."""
    if record.exc_info and record.exc_info[0] is not None:
        return record.exc_info[0]
    quoted = record.args if isinstance(record.args, tuple) else ()
    return next((type(each) for each in quoted if isinstance(each, BaseException)), None)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str | None:
    return formatter.formatException(record.exc_info) if record.exc_info and record.exc_info[0] else None


def as_word(value: str) -> str:
    """A value of a field as one word: quoted and escaped where it is not one."""
    plain = value.isprintable() and value and not set(value) & set(' "=')
    return value if plain else json.dumps(value)
