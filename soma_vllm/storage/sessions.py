"""The session store: an append-only log of events per session, and a small index to find sessions by.

Guarantees: events of one session have gapless sequence numbers, enforced by the primary key, so that two
writers can never both append the same one; an append and its index row are one transaction; every lookup
names the tenant. SQLite (WAL) by default, any database that SQLAlchemy speaks asynchronously by URL.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import JSON, Float, Index, Integer, String, event, func, inspect, make_url, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from soma_vllm.errors import ConfigError
from soma_vllm.types import Event, SessionKey


class Base(DeclarativeBase):
    """Tables of the session store."""


class SessionRow(Base):
    """One session: where it stands, and by which transcript its next request is recognised."""

    __tablename__ = "sessions"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    session: Mapped[str] = mapped_column(String(256), primary_key=True)
    phase: Mapped[str] = mapped_column(String(32))
    chain: Mapped[str] = mapped_column(String(64))
    """Fingerprint of the transcript so far."""
    updated_at: Mapped[float] = mapped_column(Float)

    __table_args__ = (Index("ix_sessions_chain", "tenant", "chain"),)


class EventRow(Base):
    """One event of a session."""

    __tablename__ = "events"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    session: Mapped[str] = mapped_column(String(256), primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True)
    """0-based, gapless."""
    kind: Mapped[str] = mapped_column(String(32))
    at: Mapped[float] = mapped_column(Float)
    data: Mapped[dict[str, object]] = mapped_column(JSON)


@dataclass(frozen=True)
class SessionSummary:
    """One row of a listing."""

    key: SessionKey
    phase: str
    updated_at: float


class SessionStore:
    """Sessions and events behind an async SQLAlchemy engine. Call `open` first and `close` last."""

    def __init__(self, url: str) -> None:
        self._engine: AsyncEngine = create_async_engine(url)
        self._transaction = async_sessionmaker(self._engine, expire_on_commit=False)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine.sync_engine, "connect", _use_wal)

    async def open(self) -> None:
        """Create missing tables."""
        async with self._engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def append(
        self, key: SessionKey, first_seq: int, events: Sequence[Event], phase: str, chain: str
    ) -> None:
        """Append events from sequence number `first_seq` on and update the index, in one transaction.

        Raises:
            sqlalchemy.exc.IntegrityError: another writer appended these sequence numbers first.
        """
        async with self._transaction() as transaction, transaction.begin():
            transaction.add_all(
                EventRow(
                    tenant=key.tenant,
                    session=key.session,
                    seq=first_seq + offset,
                    kind=item.kind,
                    at=item.at,
                    data=dict(item.data),
                )
                for offset, item in enumerate(events)
            )
            await transaction.merge(
                SessionRow(
                    tenant=key.tenant, session=key.session, phase=phase, chain=chain, updated_at=time.time()
                )
            )

    async def events(self, key: SessionKey) -> list[Event]:
        """All events of a session in order; empty when there is no such session."""
        async with self._transaction() as transaction:
            rows = await transaction.scalars(
                select(EventRow)
                .where(EventRow.tenant == key.tenant, EventRow.session == key.session)
                .order_by(EventRow.seq)
            )
            return [Event(row.kind, row.at, row.data) for row in rows]

    async def find(self, tenant: str, chain: str) -> str | None:
        """The tenant's session whose transcript has this fingerprint, the latest if several do."""
        async with self._transaction() as transaction:
            found: str | None = await transaction.scalar(
                select(SessionRow.session)
                .where(SessionRow.tenant == tenant, SessionRow.chain == chain, SessionRow.phase != "CLOSED")
                .order_by(SessionRow.updated_at.desc())
                .limit(1)
            )
            return found

    async def sessions(self, tenant: str) -> list[SessionSummary]:
        """The tenant's sessions, most recent first."""
        async with self._transaction() as transaction:
            rows = await transaction.scalars(
                select(SessionRow).where(SessionRow.tenant == tenant).order_by(SessionRow.updated_at.desc())
            )
            return [
                SessionSummary(SessionKey(row.tenant, row.session), row.phase, row.updated_at) for row in rows
            ]

    async def keys(self, tenant: str | None = None) -> list[SessionKey]:
        """Every session on record, of one tenant or of all, in the order of their names."""
        wanted = select(SessionRow.tenant, SessionRow.session).order_by(SessionRow.tenant, SessionRow.session)
        if tenant is not None:
            wanted = wanted.where(SessionRow.tenant == tenant)
        async with self._transaction() as transaction:
            return [SessionKey(*row) for row in await transaction.execute(wanted)]

    async def missing_tables(self) -> list[str]:
        """Tables of the session store that this database lacks."""
        async with self._engine.connect() as connection:
            found = await connection.run_sync(lambda sync: inspect(sync).get_table_names())
        return sorted(Base.metadata.tables.keys() - set(found))

    async def count(self) -> int:
        """Sessions on record, over all tenants."""
        async with self._transaction() as transaction:
            return await transaction.scalar(select(func.count()).select_from(SessionRow)) or 0


@asynccontextmanager
async def reading(url: str) -> AsyncIterator[SessionStore]:
    """A store that exists, to read from; nothing is created.

    Raises:
        ConfigError: there is no session store at this URL, or it cannot be read.
    """
    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        expected = "expected an SQLAlchemy URL such as sqlite+aiosqlite:///sessions.db"
        raise ConfigError("session store", [f"found {url!r}; {expected}"]) from error
    name = parsed.render_as_string(hide_password=True)
    file = parsed.database if parsed.get_backend_name() == "sqlite" else None
    if file is not None and not Path(file).is_file():
        raise ConfigError(name, [f"found no file {file}; expected a session store"])
    try:
        store = SessionStore(url)
    except (SQLAlchemyError, ImportError) as error:
        raise ConfigError(name, [f"found {parsed.drivername}; {error}"]) from error
    try:
        if missing := await store.missing_tables():
            raise ConfigError(name, [f"found no table {', '.join(missing)}; expected a session store"])
        yield store
    except (SQLAlchemyError, OSError) as error:
        raise ConfigError(name, [f"cannot be read ({type(error).__name__})"]) from error
    finally:
        await store.close()


def _use_wal(connection: object, record: object) -> None:
    """Readers never wait for the writer, and a commit costs one fsync."""
    cursor = connection.cursor()  # type: ignore[attr-defined]
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA busy_timeout=5000")
    cursor.close()
