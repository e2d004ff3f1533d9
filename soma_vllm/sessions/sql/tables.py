"""The tables of the session store, and how values that databases refuse are encoded in them.

Guarantees: ids that clients chose and documents come back exactly as they were stored, on SQLite and PostgreSQL
alike, NUL characters, lone surrogates, NaN and infinities included; conversation text is in `texts`, and, as
clients retrieve it, in `objects` and `items`. The
same tables are written down a second time, as steps, in `migrations/`; a test holds the two together.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sqlalchemy import JSON, BigInteger, Float, Index, Integer, String, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from soma_vllm.sessions.state.adapter_states import AdapterState

CLOSED = "CLOSED"
"""Phase of a session that is being removed: it is not found, counted or listed as a user of an adapter."""

RETIRED = AdapterState.RETIRED.value
"""State of an adapter whose files are gone."""

_REFUSED = re.compile("[\\\\\x00\ud800-\udfff]")
_SPELT = re.compile(r"\\([0-9a-f]{4})")


class Name(TypeDecorator[str]):
    """An id that a client chose. What PostgreSQL or UTF-8 cannot hold is spelt `\\` and four hex digits."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else _REFUSED.sub(lambda found: f"\\{ord(found[0]):04x}", value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else _SPELT.sub(lambda found: chr(int(found[1], 16)), value)


class Document(TypeDecorator[Mapping[str, Any]]):
    """A JSON object as ASCII text: PostgreSQL's JSON types refuse NaN, and jsonb some of what people type."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, Any] | None, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(dict(value), separators=(",", ":"))

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    """Tables of the session store."""


class SessionRow(Base):
    """One session: where it stands."""

    __tablename__ = "sessions"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    session: Mapped[str] = mapped_column(Name, primary_key=True)
    family: Mapped[str] = mapped_column(Name)
    """Shared by all branches of one dialogue."""
    phase: Mapped[str] = mapped_column(String(32))
    chain: Mapped[str] = mapped_column(String(64))
    """Digest of the transcript so far."""
    ending: Mapped[str | None] = mapped_column(String(16))
    """Digest of the last answer's words; NULL in rows of version 0.1."""
    turns: Mapped[int] = mapped_column(Integer)
    adapter: Mapped[str | None] = mapped_column(Name)
    """Name of the adapter that serves it."""
    updated_at: Mapped[float] = mapped_column(Float)
    """Unix time of the last append, seconds; never the same twice in one process."""

    __table_args__ = (
        Index("ix_sessions_updated_at", "updated_at"),
        Index("ix_sessions_chain", "tenant", "family", "chain"),
        Index("ix_sessions_ending", "tenant", "family", "ending"),
        Index("ix_sessions_tenant", "tenant", "updated_at"),
        Index("ix_sessions_adapter", "adapter"),
    )


class EventRow(Base):
    """One event of a session."""

    __tablename__ = "events"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    session: Mapped[str] = mapped_column(Name, primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """0-based, gapless."""
    kind: Mapped[str] = mapped_column(String(32))
    at: Mapped[float] = mapped_column(Float)
    data: Mapped[Mapping[str, Any]] = mapped_column(Document)


class TextRow(Base):
    """What was said in one event. Its key is the event's."""

    __tablename__ = "texts"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    session: Mapped[str] = mapped_column(Name, primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    at: Mapped[float] = mapped_column(Float)
    data: Mapped[Mapping[str, Any]] = mapped_column(Document)

    __table_args__ = (Index("ix_texts_at", "at"),)


class TurnRow(Base):
    """One turn, by which a later request's history is recognised. An event may bring several."""

    __tablename__ = "turns"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    session: Mapped[str] = mapped_column(Name, primary_key=True)
    seq: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """1-based place in its session."""
    family: Mapped[str] = mapped_column(Name)
    chain: Mapped[str] = mapped_column(String(64))
    response: Mapped[str | None] = mapped_column(Name)
    """Id under which a client may name it."""
    at: Mapped[float] = mapped_column(Float)
    link: Mapped[str | None] = mapped_column(String(32))
    """Of version 0.1; not used any more."""

    __table_args__ = (
        Index("ix_turns_chain", "tenant", "family", "chain"),
        Index("ix_turns_response", "tenant", "response"),
    )


class RecordRow(Base):
    """Which record this database is: one row. A copy of the database has the same, until it is adopted."""

    __tablename__ = "record"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)


class ObjectRow(Base):
    """One response or conversation of OpenAI's, as a client retrieves it."""

    __tablename__ = "objects"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    id: Mapped[str] = mapped_column(Name, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    session: Mapped[str] = mapped_column(Name)
    """The session that it goes with; empty for none."""
    at: Mapped[float] = mapped_column(Float)
    data: Mapped[Mapping[str, Any]] = mapped_column(Document)
    """The object; a response with its output, and so with text."""

    __table_args__ = (Index("ix_objects_session", "tenant", "session"), Index("ix_objects_at", "at"))


class ItemRow(Base):
    """One item of a response's input or output, or of a conversation."""

    __tablename__ = "items"
    tenant: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(Name, primary_key=True)
    position: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(Name)
    part: Mapped[str] = mapped_column(String(16))
    at: Mapped[float] = mapped_column(Float)
    data: Mapped[Mapping[str, Any]] = mapped_column(Document)

    __table_args__ = (Index("ix_items_id", "tenant", "id"), Index("ix_items_at", "at"))


class AdapterRow(Base):
    """One adapter that this record published, and the session that owns it."""

    __tablename__ = "adapters"
    name: Mapped[str] = mapped_column(Name, primary_key=True)
    tenant: Mapped[str] = mapped_column(String(64))
    session: Mapped[str] = mapped_column(Name)
    number: Mapped[int] = mapped_column(Integer)
    path: Mapped[str] = mapped_column(Name)
    state: Mapped[str] = mapped_column(String(32))
    updated_at: Mapped[float] = mapped_column(Float)
    version: Mapped[int | None] = mapped_column(Integer)
    """This and what follows: None where a version before 0003 published it, until a server has started."""
    base_model: Mapped[str | None] = mapped_column(Name)
    rank: Mapped[int | None] = mapped_column(Integer)
    size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    created: Mapped[float | None] = mapped_column(Float)
    """Unix time, seconds."""

    __table_args__ = (Index("ix_adapters_session", "tenant", "session"),)


class AuditRow(Base):
    """One order of an administrator, or of a key's owner about its own sessions."""

    __tablename__ = "audit"
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[float] = mapped_column(Float)
    who: Mapped[str] = mapped_column(String(64))
    what: Mapped[str] = mapped_column(Name)
    request: Mapped[str | None] = mapped_column(String(128))


class ApiKeyRow(Base):
    """One API key that this server issued. The key itself is not stored."""

    __tablename__ = "api_keys"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    digest: Mapped[str] = mapped_column(String(64))
    tenant: Mapped[str] = mapped_column(String(64))
    limits: Mapped[dict[str, Any]] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(Float)
    """Unix time, seconds."""
    revoked_at: Mapped[float | None] = mapped_column(Float)
