"""API keys that this server issued: `sk-soma-<id>-<secret>`.

Guarantees: a key is shown once and never stored, its SHA-256 is; it is found by its id and compared as a digest
in constant time, against a stand-in where there is no such id; a key's tenant is the one its bearer token has
anyway, so that what finds sessions by tenant need not know of keys.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256

from pydantic import ValidationError
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from soma_vllm.config import Limits
from soma_vllm.errors import BadRequest, NotFound, StoreUnavailable
from soma_vllm.sessions.sql.audit_trail import Order, row_of
from soma_vllm.sessions.sql.connections import connect
from soma_vllm.sessions.sql.outages import translated
from soma_vllm.sessions.sql.schema import migrate
from soma_vllm.sessions.sql.tables import ApiKeyRow, AuditRow
from soma_vllm.sessions.state.identity import tenant_of

logger = logging.getLogger(__name__)

KEY_SHAPE = re.compile(r"sk-soma-([0-9a-f]{12})-[A-Za-z0-9_-]{32,128}")
NAME_LENGTH = 128
SECRET_BYTES = 32
STORE = "the key store"
OPERATOR = "operator"
"""Who gives the orders of a command."""


@dataclass(frozen=True)
class ApiKey:
    """What is known of an issued key."""

    id: str
    name: str
    digest: str
    """SHA-256 of the key, hexadecimal."""
    tenant: str
    limits: Limits
    """The key's own: only the fields that are set in it."""
    created_at: float
    """Unix time, seconds."""
    revoked_at: float | None


NOBODY = sha256(secrets.token_bytes(SECRET_BYTES)).hexdigest()
"""The digest of no key, to compare with where an id is unknown."""


class KeyStore:
    """Keys behind a pool of connections to a session store. Every verb raises StoreUnavailable."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @classmethod
    def at(cls, url: str) -> KeyStore:
        """A store with connections of its own: a flood of wrong keys takes none from the sessions.

        Raises:
            ConfigError: this is no database URL, or of a database that the store does not know.
        """
        return cls(connect(url))

    async def open(self) -> None:
        """Make the tables, or bring those of an older version up to date, as `SessionStore.open` does.

        Raises:
            ConfigError: the database is newer than this code, or its tables are another program's.
        """
        with translated(STORE):
            await migrate(self._engine)

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def add(
        self, name: str, limits: Limits, key: str | None = None, by: str = OPERATOR
    ) -> tuple[str, str]:
        """Issue a key, a new random one unless `key` is given; (its id, the key). `by` orders it.

        Raises:
            BadRequest: the name or the key is not fit for one, or the key's id is taken.
        """
        if not (name.strip() and name.isprintable() and len(name) <= NAME_LENGTH):
            raise BadRequest(f"name: found {name!r}; expected 1 to {NAME_LENGTH} printable characters", "name")
        if key is None:
            key = f"sk-soma-{secrets.token_hex(6)}-{secrets.token_urlsafe(SECRET_BYTES)}"
        shaped = KEY_SHAPE.fullmatch(key)
        if shaped is None:
            raise BadRequest("key: expected sk-soma-, 12 hexadecimal digits, -, 32 to 128 of A-Z a-z 0-9 _ -")
        row = ApiKeyRow(
            id=shaped[1],
            name=name,
            digest=digest_of(key),
            tenant=tenant_of(f"Bearer {key}"),
            limits=limits.model_dump(exclude_unset=True),
            created_at=time.time(),
            revoked_at=None,
        )
        async with self._transaction() as transaction:
            if await transaction.get(ApiKeyRow, row.id) is not None:
                raise BadRequest(f"key: id {row.id} is taken; expected a new one")
            transaction.add(row)
            await _ordered(transaction, by, f"key add {row.id} ({name})")
        return row.id, key

    async def ls(self) -> list[ApiKey]:
        """Every key ever issued, oldest first."""
        async with self._transaction() as transaction:
            rows = await transaction.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at, ApiKeyRow.id))
            return [_read(row) for row in rows]

    async def readable(self) -> list[ApiKey]:
        """Every key in use, but for those whose limits cannot be read: each of them fails by itself."""
        async with self._transaction() as transaction:
            rows = (await transaction.scalars(select(ApiKeyRow).where(ApiKeyRow.revoked_at.is_(None)))).all()
        found = []
        for row in rows:
            try:
                found.append(_read(row))
            except StoreUnavailable as error:
                logger.error("%s", error)
        return found

    async def find(self, key_id: str) -> ApiKey | None:
        """The key of this id, revoked or not."""
        async with self._transaction() as transaction:
            row = await transaction.get(ApiKeyRow, key_id)
            return None if row is None else _read(row)

    async def revoke(self, key_id: str, by: str = OPERATOR) -> None:
        """End a key's use. A key that was revoked before keeps that time. `by` orders it.

        Raises:
            NotFound: no key has this id.
        """
        async with self._transaction() as transaction:
            row = await transaction.get(ApiKeyRow, key_id)
            if row is None:
                raise NotFound(f"key {key_id!r}: no key has this id")
            row.revoked_at = row.revoked_at or time.time()
            await _ordered(transaction, by, f"key revoke {key_id}")

    async def verify(self, key: str) -> ApiKey | None:
        """The record of a key that is in use; None for any other."""
        shaped = KEY_SHAPE.fullmatch(key)
        if shaped is None:
            return None
        found = await self.find(shaped[1])
        expected = NOBODY if found is None else found.digest
        right = hmac.compare_digest(digest_of(key).encode(), expected.encode())
        return found if right and found is not None and found.revoked_at is None else None

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[AsyncSession]:
        with translated(STORE):
            async with self._sessions() as session, session.begin():
                yield session


def digest_of(key: str) -> str:
    """SHA-256 of a key, hexadecimal."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


async def _ordered(transaction: AsyncSession, by: str, what: str) -> None:
    """Put an order on record, in the transaction that carries it out."""
    await transaction.execute(insert(AuditRow), [row_of(Order(by, what))])


def _read(row: ApiKeyRow) -> ApiKey:
    try:
        limits = Limits.model_validate(row.limits)
    except ValidationError as error:
        raise StoreUnavailable(f"key {row.id}: its limits in the database are not limits") from error
    return ApiKey(row.id, row.name, row.digest, row.tenant, limits, row.created_at, row.revoked_at)
