"""Bringing a database's tables up to date, and telling when it is not ours to touch.

Guarantees: the steps in `migrations/` are applied in one transaction under a lock of the database's own, so
that any number of processes may open one new database at once; a database that is newer than this code, or
holds tables of our names that these steps did not make, is refused and its tables stay as they are.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random

from soma_vllm.errors import ConfigError
from soma_vllm.private import keep_private
from soma_vllm.sessions.sql.connections import BUSY_MS, told
from soma_vllm.sessions.sql.tables import Base

MIGRATIONS = Path(__file__).parent / "migrations"
LOCKS = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "SELECT pg_advisory_xact_lock(hashtext('soma_vllm session store'))",
}
"""What makes other processes wait until the end of this transaction."""

_ALEMBIC = threading.Lock()
"""Alembic keeps the migration under way in module globals."""


WAL = "PRAGMA journal_mode=WAL"
"""Readers of SQLite never wait for the writer. The file remembers it."""


async def migrate(engine: AsyncEngine, down_to: str | None = None) -> tuple[str, str]:
    """Make the tables, or apply the steps that a database made by an older version lacks; with `down_to`, take
    back those after that revision. Returns (the revision found, the revision reached).

    Raises:
        ConfigError: the database is newer than this code, its tables are not from these steps, or `down_to` is
            no revision that it could go back to.
    """
    # Polled, because the holder may be a coroutine of this very event loop.
    while not _ALEMBIC.acquire(blocking=False):
        await asyncio.sleep(0.01)
    try:
        if engine.dialect.name == "sqlite":
            _keep_private(engine.url.database)
            await _use_wal(engine)
        async with engine.begin() as connection:
            await connection.exec_driver_sql(LOCKS[engine.dialect.name])
            return await connection.run_sync(_migrate, down_to)
    finally:
        _ALEMBIC.release()


def _keep_private(database: str | None) -> None:
    """SQLite gives its write-ahead log the permissions that the database has."""
    if database and not database.startswith((":memory:", "file:")):
        there = (Path(f"{database}{suffix}") for suffix in ("-wal", "-shm"))
        for file in (Path(database), *filter(Path.exists, there)):
            keep_private(file)


async def _use_wal(engine: AsyncEngine) -> None:
    """Tried again for a while: where two processes do it at once, SQLite refuses one without waiting."""
    attempts = AsyncRetrying(
        retry=retry_if_exception_type(OperationalError),
        stop=stop_after_delay(BUSY_MS / 1000),
        wait=wait_random(0.01, 0.05),
        reraise=True,
    )
    async for attempt in attempts:
        with attempt:
            async with engine.connect() as connection:
                await connection.exec_driver_sql(WAL)


def refuse_other_versions(connection: Connection) -> None:
    """Raise ConfigError where this is no session store, or not one of this version."""
    found, (head, _) = _revisions(connection), _known()
    if found in (set(), {head}) and (missing := missing_tables(connection)):
        raise _refused(connection, f"found no table {', '.join(missing)}; expected a session store")
    if found != {head}:
        upgrades = f"expected {head} (`soma storage migrate`, or a server that starts, upgrades an older one)"
        raise _refused(connection, f"found revision {_listed(found)}; {upgrades}")


def missing_tables(connection: Connection) -> list[str]:
    """Tables of the session store that this database lacks."""
    return sorted(Base.metadata.tables.keys() - set(inspect(connection).get_table_names()))


def _migrate(connection: Connection, down_to: str | None) -> tuple[str, str]:
    found, (head, known) = _revisions(connection), _known()
    if unknown := found - known:
        newer = f"found revision {_listed(unknown)}; expected {head} or older"
        back = f"the newer one's `soma storage migrate --downgrade {head}` brings it back"
        raise _refused(connection, f"{newer}: it was made by a newer version ({back}), or by another program")
    ours = Base.metadata.tables.keys() & set(inspect(connection).get_table_names())
    if ours and not found:
        made = "expected an empty database, or one that this version's migrations made"
        raise _refused(connection, f"found tables {_listed(ours)} without a revision; {made}")
    config = _alembic()
    config.attributes["connection"] = connection
    if down_to is None and found != {head}:
        command.upgrade(config, "head")
    elif down_to is not None:
        older = {revision for revision in known if revision <= max(found, default="")}
        if down_to not in older:
            raise _refused(connection, f"found revision {down_to!r}; expected one of {_listed(older)}")
        command.downgrade(config, down_to)
    return _listed(found), _listed(_revisions(connection))


def _revisions(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection).get_current_heads())


def _known() -> tuple[str, set[str]]:
    """(the newest revision, all revisions) that this code has."""
    script = ScriptDirectory.from_config(_alembic())
    known = {step.revision for step in script.walk_revisions()}
    return script.get_current_head() or "", known


def _alembic() -> AlembicConfig:
    """Alembic's settings, without a file of them."""
    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config


def _refused(connection: Connection, problem: str) -> ConfigError:
    return ConfigError(told(connection.engine.url), [problem])


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
