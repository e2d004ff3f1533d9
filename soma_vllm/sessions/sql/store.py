"""The session store: an append-only log of events per session, and an index to find sessions by.

Guarantees: events of one session have sequence numbers of their own, enforced by the primary key, so that two
writers can never both append the same one; an append is one transaction, with the text, the turns and the
adapters that belong to it; what was erased is gone from an SQLite database's files. SQLite (WAL) by default,
PostgreSQL by URL.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, Delete, Insert, bindparam, delete, func, insert, select, tuple_, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from soma_vllm.errors import ConfigError, StoreUnavailable
from soma_vllm.sessions.sql.audit_trail import AuditTrail
from soma_vllm.sessions.sql.connections import BUSY_MS, parse, told
from soma_vllm.sessions.sql.outages import translated
from soma_vllm.sessions.sql.queries import SessionReader, of
from soma_vllm.sessions.sql.records import FACTS, AdapterRecord, Append, SessionSnapshot, TurnMark
from soma_vllm.sessions.sql.schema import migrate
from soma_vllm.sessions.sql.stored_objects import (
    StoredObjects,
    erased_before,
    erased_with,
    removed_with,
    unused_since,
)
from soma_vllm.sessions.sql.tables import (
    RETIRED,
    AdapterRow,
    Base,
    EventRow,
    Name,
    RecordRow,
    SessionRow,
    TextRow,
    TurnRow,
)
from soma_vllm.types import Event, SessionKey

logger = logging.getLogger(__name__)

ERASED_AT_ONCE = 1000
"""Texts per transaction where many are erased: writers wait for no more than these."""
SCRUB_BUSY_MS = 1_000
"""Longest wait for readers of an SQLite file when its write-ahead log is emptied; writers wait as long."""


class SessionStore(SessionReader):
    """Sessions and events behind a pool of connections. Call `open` first and `close` last.

    Every verb raises StoreUnavailable while the database is away, and works again when it is back.
    """

    def __init__(self, url: str) -> None:
        """Opens no connection yet.

        Raises:
            ConfigError: `url` is of no database that the store knows.
        """
        super().__init__(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._put_session = self._upsert(SessionRow)
        self._put_adapter = self._upsert(AdapterRow, kept=FACTS)
        self._latest = 0.0
        self.objects = StoredObjects(self._transaction)
        """Responses and conversations."""
        self.audit = AuditTrail(self._transaction)
        """Administrators' orders."""

    async def open(self) -> None:
        """Make the tables, or bring those of an older version up to date.

        Raises:
            ConfigError: the database is newer than this code, or its tables are another program's.
            StoreUnavailable: it cannot be opened; the message says why.
        """
        try:
            with translated():
                await migrate(self._engine)
        except StoreUnavailable as error:
            cause = getattr(error.__cause__, "orig", None) or error.__cause__
            raise StoreUnavailable(f"{told(self._engine.url)}: {cause or error}") from error.__cause__

    async def append(
        self,
        key: SessionKey,
        first_seq: int,
        events: Sequence[Event],
        standing: SessionSnapshot,
        marks: Sequence[TurnMark] = (),
        adapters: Sequence[AdapterRecord] = (),
    ) -> None:
        """Append events of one session: see `Append`, and `append_all`."""
        await self.append_all([Append(key, first_seq, events, standing, marks, adapters)])

    async def append_all(self, appends: Sequence[Append]) -> None:
        """Append events of several sessions and say where each stands: one transaction, all of it or nothing.

        Raises:
            StoreRefused: another writer appended some of these sequence numbers first.
        """
        tables = (insert(EventRow), insert(TextRow), insert(TurnRow), self._put_session, self._put_adapter)
        rows: list[list[dict[str, Any]]] = [[] for _ in tables]
        for append in appends:
            for known, found in zip(rows, self._rows_of(append), strict=True):
                known += found
        async with self._transaction() as connection:
            for statement, known in zip(tables, rows, strict=True):
                await _put(connection, statement, known)

    def _rows_of(self, append: Append) -> Iterator[list[dict[str, Any]]]:
        """Rows of events, texts, turns, sessions and adapters, in this order."""
        owner = {"tenant": append.key.tenant, "session": append.key.session}
        now = {"updated_at": self._now()}
        numbered = dict(enumerate(append.events, append.first_seq))
        yield [
            owner | {"seq": seq, "kind": event.kind, "at": event.at, "data": event.data}
            for seq, event in numbered.items()
        ]
        yield [
            owner | {"seq": seq, "at": event.at, "data": event.text}
            for seq, event in numbered.items()
            if event.text is not None
        ]
        family = {"family": append.snapshot.family}
        yield [owner | vars(mark) | family | {"at": numbered[mark.seq].at} for mark in append.marks]
        yield [owner | vars(append.snapshot) | now]
        yield [adapter.columns() | now for adapter in append.adapters]

    async def index(self, adapters: Sequence[AdapterRecord]) -> None:
        """Say where adapters stand, and what they are, apart from any event of their sessions."""
        now = {"updated_at": self._now()}
        async with self._transaction() as connection:
            await _put(connection, self._put_adapter, [adapter.columns() | now for adapter in adapters])

    async def retired(self, adapter: str) -> None:
        """An adapter's files are gone; its record stays as long as that of its session."""
        one = AdapterRow.name == adapter
        sessions = select(SessionRow.session).where(
            SessionRow.tenant == AdapterRow.tenant, SessionRow.session == AdapterRow.session
        )
        gone = update(AdapterRow).where(one).values(state=RETIRED, updated_at=self._now())
        async with self._transaction() as connection:
            await connection.execute(gone)
            await connection.execute(delete(AdapterRow).where(one, ~sessions.exists()))

    async def adopt(self) -> str:
        """Make a copied database a record of its own, and return its new id.

        The adapters stay the other record's: sessions that they serve are given back to the original by the
        next server that starts.
        """
        record_id = secrets.token_hex(16)
        async with self._transaction() as connection:
            await connection.execute(update(RecordRow).values(id=record_id))
            await connection.execute(delete(AdapterRow))
        return record_id

    async def erase_text(self, key: SessionKey) -> int:
        """Erase what was said in a session and keep the rest; how many events lost their text."""
        async with self._transaction() as connection:
            erased = (await connection.execute(delete(TextRow).where(of(TextRow, key)))).rowcount
            for statement in erased_with(key):
                await connection.execute(statement)
        await self._scrub()
        return erased

    async def erase_texts_before(self, at: float) -> int:
        """Erase what was said before a Unix time, in all sessions; how many events lost their text."""
        place = (TextRow.tenant, TextRow.session, TextRow.seq)
        oldest = select(*place).where(TextRow.at < at).order_by(TextRow.at).limit(ERASED_AT_ONCE)
        total = 0
        while erased := await self._delete(delete(TextRow).where(tuple_(*place).in_(oldest))):
            total += erased
        await self._delete(*erased_before(at))
        await self._scrub()
        return total

    async def delete(self, *keys: SessionKey) -> None:
        """Remove everything of some sessions, in one transaction; the records of those of their adapters that
        are not retired yet stay until they are."""
        each = SessionKey(bindparam("of_tenant"), bindparam("of_session", type_=Name))  # type: ignore[arg-type]
        tables = (TextRow, TurnRow, EventRow, SessionRow)
        retired = delete(AdapterRow).where(of(AdapterRow, each), AdapterRow.state == RETIRED)
        rows = (delete(table).where(of(table, each)) for table in tables)
        given = [{"of_tenant": key.tenant, "of_session": key.session} for key in keys]
        async with self._transaction() as connection:
            for statement in (*removed_with(each), *rows, retired):
                await connection.execute(statement, given)
        await self._scrub()

    async def delete_unused_objects(self, at: float) -> None:
        """Remove responses and conversations that are older than a Unix time and belong to no session."""
        if await self._delete(*unused_since(at)):
            await self._scrub()

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncConnection]:
        with translated():
            async with self._engine.begin() as connection:
                yield connection

    async def _delete(self, *statements: Delete) -> int:
        """Rows deleted by the statements, all in one transaction."""
        async with self._transaction() as connection:
            return sum([(await connection.execute(statement)).rowcount for statement in statements])

    async def _scrub(self) -> None:
        """Empty SQLite's write-ahead log, which still holds pages as they were before they were overwritten."""
        if not self._is_sqlite:
            return
        async with self._connection() as connection:
            await connection.exec_driver_sql(f"PRAGMA busy_timeout={SCRUB_BUSY_MS}")
            try:
                emptied = await connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
                busy, *_ = emptied.one()
            finally:
                await connection.exec_driver_sql(f"PRAGMA busy_timeout={BUSY_MS}")
        if busy:
            logger.warning(
                "a reader holds SQLite's write-ahead log; erased text stays in that file until the next erasure"
            )

    def _upsert(self, table: type[Base], kept: Sequence[str] = ()) -> Insert:
        """Insert rows, or replace those of the same key; a NULL in one of `kept` leaves what is there."""
        dialect = sqlite if self._is_sqlite else postgresql
        statement: sqlite.Insert | postgresql.Insert = dialect.insert(table)
        columns = table.__table__.columns
        replaced: dict[str, ColumnElement[Any]] = {
            column.name: statement.excluded[column.name] for column in columns if not column.primary_key
        }
        replaced |= {name: func.coalesce(replaced[name], columns[name]) for name in kept}
        keys = [column.name for column in columns if column.primary_key]
        return statement.on_conflict_do_update(index_elements=keys, set_=replaced)

    def _now(self) -> float:
        """Unix time, never the same twice: listings go on from one session's time to the next."""
        self._latest = max(time.time(), math.nextafter(self._latest, math.inf))
        return self._latest


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[SessionStore]:
    """A store that exists, to read from; nothing is created, and nothing brought up to date.

    Raises:
        ConfigError: there is no session store of this version at this URL, or it cannot be read.
    """
    refuse_missing_file(url)
    parsed, store = parse(url), SessionStore(url)
    try:
        await store.refuse_other_versions()
        yield store
    except StoreUnavailable as error:
        raise ConfigError(told(parsed), [f"cannot be read: {error}"]) from error
    finally:
        await store.close()


def refuse_missing_file(url: str) -> None:
    """Raise ConfigError where this is an SQLite database whose file is not there."""
    parsed = parse(url)
    file = parsed.database if parsed.get_backend_name() == "sqlite" else None
    if file is not None and not Path(file).is_file():
        raise ConfigError(told(parsed), [f"found no file {file}; expected a session store"])


async def _put(connection: AsyncConnection, statement: Insert, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        await connection.execute(statement, rows)
