"""PostgreSQL's lease on a record: an advisory lock of its database, held by one connection.

Guarantees: of the processes that use one database at most one holds it; PostgreSQL frees it when the connection
ends, so none outlives its process.
"""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from soma_vllm.errors import StoreUnavailable
from soma_vllm.sessions.sql.connections import connect
from soma_vllm.sessions.sql.outages import translated

TRY = text("SELECT pg_try_advisory_lock(hashtext('soma_vllm record'))")


class AdvisoryLease:
    """The lease of one process. Every verb raises StoreUnavailable while the database is away."""

    def __init__(self, url: str) -> None:
        self._engine = connect(url)
        self._connection: AsyncConnection | None = None

    async def take(self) -> bool:
        """Whether it is ours now."""
        with translated():
            connection = await self._engine.connect()
            await connection.execution_options(isolation_level="AUTOCOMMIT")  # no transaction stays open
            granted = bool((await connection.execute(TRY)).scalar_one())
            if granted:
                self._connection = connection
            else:
                await connection.close()
        return granted

    async def kept(self) -> bool:
        """Whether it is still ours; it is taken again where the connection was lost."""
        if self._connection is not None:
            try:
                with translated():
                    await self._connection.execute(text("SELECT 1"))
                return True
            except StoreUnavailable:
                await self._connection.invalidate()
                self._connection = None
        return await self.take()

    async def close(self) -> None:
        """Give it back."""
        if self._connection is not None:
            await self._connection.close()
        await self._engine.dispose()
