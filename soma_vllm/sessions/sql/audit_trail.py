"""The orders of administrators on record: who, what, when, by which request. One row each, never changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from soma_vllm.sessions.sql.tables import AuditRow


@dataclass(frozen=True)
class Order:
    """One order that was carried out."""

    who: str
    """`admin`, `key <id>`, `tenant <digest>`, or `operator <user>` of a command; never a secret."""
    what: str
    request: str | None = None
    """The request's id; None for a command's."""
    at: float = field(default_factory=time.time)
    """Unix time, seconds."""
    number: int | None = None
    """Grows with every order; given by the store."""


class AuditTrail:
    """The orders, behind a session store's connections. Every verb raises StoreUnavailable as that does."""

    def __init__(self, begin: Callable[[], AbstractAsyncContextManager[AsyncConnection]]) -> None:
        """`begin` opens a transaction."""
        self._begin = begin

    async def note(self, order: Order) -> None:
        """Put an order on record."""
        async with self._begin() as connection:
            await connection.execute(insert(AuditRow), [row_of(order)])

    async def latest(self, limit: int, before: int | None = None) -> list[Order]:
        """At most `limit` orders, the latest first, from those before number `before` on."""
        columns = (AuditRow.who, AuditRow.what, AuditRow.request, AuditRow.at, AuditRow.number)
        wanted = select(*columns).order_by(AuditRow.number.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(AuditRow.number < before)
        async with self._begin() as connection:
            return [Order(*row) for row in await connection.execute(wanted)]


def row_of(order: Order) -> dict[str, object]:
    """An order's row, which the database numbers."""
    return {name: value for name, value in vars(order).items() if name != "number"}
