"""Connections to the session store's database: SQLite by aiosqlite, PostgreSQL by asyncpg.

Guarantees: an error never quotes what was being stored; every connection to SQLite overwrites what it deletes;
a PostgreSQL that went away is told within a minute, and used again when it is back; a value that PostgreSQL
refuses is a `DataError`, which trying again does not help, and an outage is not.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import URL, event, make_url, text
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import ArgumentError, DataError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from soma_vllm.errors import ConfigError

DRIVERS = ("sqlite+aiosqlite", "postgresql+asyncpg")
BUSY_MS = 5_000
"""Longest wait for another writer of an SQLite file, milliseconds."""
CONNECT_S = 10.0
COMMAND_S = 60.0
"""Longest wait for PostgreSQL to take a connection and to answer a statement, seconds."""
REFUSED_VALUES = ("22", "54")
"""SQLSTATE classes: data exception, program limit exceeded."""


def connect(url: str) -> AsyncEngine:
    """A pool of connections; none is opened yet.

    Raises:
        ConfigError: this is no database URL, or of a database or driver that the store does not know.
    """
    parsed = parse(url)
    if parsed.drivername not in DRIVERS:
        raise ConfigError(told(parsed), [f"found {parsed.drivername}; expected {' or '.join(DRIVERS)}"])
    if parsed.get_backend_name() == "sqlite":
        engine = create_async_engine(parsed, hide_parameters=True)
        event.listen(engine.sync_engine, "connect", _prepare_sqlite)
        return engine
    limits = {"timeout": CONNECT_S, "command_timeout": COMMAND_S}
    engine = create_async_engine(parsed, hide_parameters=True, pool_pre_ping=True, connect_args=limits)
    event.listen(engine.sync_engine, "handle_error", _name_refused_values)
    return engine


async def unreachable(engine: AsyncEngine) -> str | None:
    """Why a database server does not answer; None where it does. The engine is closed."""
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError, TimeoutError) as error:  # the class alone: the text may hold the password
        return f"{told(engine.url)} does not answer ({type(error).__name__}); expected a running database"
    finally:
        await engine.dispose()
    return None


def parse(url: str) -> URL:
    """A database URL's parts.

    Raises:
        ConfigError: this is no database URL.
    """
    try:
        return make_url(url)
    except (ArgumentError, ValueError) as error:  # not quoted: there may be a password in it
        expected = "expected an SQLAlchemy URL such as sqlite+aiosqlite:///sessions.db"
        raise ConfigError(
            "session store", [f"found something else ({type(error).__name__}); {expected}"]
        ) from None


def told(url: URL) -> str:
    """A database URL as people may see it."""
    return url.render_as_string(hide_password=True)


def _prepare_sqlite(connection: Any, record: object) -> None:
    """What is deleted is overwritten, and in WAL mode (`schema`) a commit need not wait for the disk."""
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_MS}")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA secure_delete=ON")
    cursor.close()


def _name_refused_values(context: ExceptionContext) -> DataError | None:
    """SQLAlchemy's asyncpg dialect leaves such errors without a class of their own."""
    state = getattr(context.original_exception, "sqlstate", None) or ""
    if not state.startswith(REFUSED_VALUES):
        return None
    return DataError(context.statement, None, context.original_exception, hide_parameters=True)
