"""Responses and conversations on record: OpenAI's objects, which clients retrieve by their ids.

Guarantees: nothing is found outside its tenant; an object goes with the session that it belongs to, and its
text with that session's; one that belongs to no session on record goes when it is as old as an unused session
may become. The statements that erase run inside the session store's own transactions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Delete, Select, delete, exists, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from soma_vllm.sessions.sql.tables import ItemRow, ObjectRow, SessionRow
from soma_vllm.types import SessionKey

RESPONSE, CONVERSATION, DELETED = "response", "conversation", "deleted"
"""Kinds of objects. Of a response that its client deleted, the id stays: no request goes on from it."""

MOST_PARAMETERS = 500
"""Ids in one statement."""


@dataclass(frozen=True)
class StoredObject:
    """A response, with its output, or a conversation, without its items."""

    id: str
    kind: str
    session: str
    """The session that it belongs to; empty for none."""
    data: Mapping[str, Any]
    at: float = 0.0
    """Unix time of its last change, seconds."""


@dataclass(frozen=True)
class StoredItem:
    """An item of a response's input or output, or of a conversation."""

    id: str
    part: str
    """input, output or item."""
    data: Mapping[str, Any]


class StoredObjects:
    """The objects, behind the session store's connections. Every verb raises StoreUnavailable as the store
    does."""

    def __init__(self, begin: Callable[[], AbstractAsyncContextManager[AsyncConnection]]) -> None:
        """`begin` opens a transaction."""
        self._begin = begin

    async def put(self, tenant: str, stored: StoredObject, items: Sequence[StoredItem] = ()) -> None:
        """Store an object and its items, in place of what is stored under its id."""
        row = {"tenant": tenant, **vars(stored), "at": stored.at or time.time()}
        async with self._begin() as connection:
            for statement in _gone(tenant, stored.id):
                await connection.execute(statement)
            await connection.execute(insert(ObjectRow), [row])
            await _add(connection, tenant, stored.id, 0, items)

    async def find(self, tenant: str, id: str) -> StoredObject | None:
        """The object of this id."""
        wanted = select(ObjectRow.id, ObjectRow.kind, ObjectRow.session, ObjectRow.data, ObjectRow.at)
        rows = await self._rows(wanted.where(ObjectRow.tenant == tenant, ObjectRow.id == id))
        return StoredObject(*rows[0]) if rows else None

    async def items(self, tenant: str, owner: str) -> list[StoredItem]:
        """An object's items, in order."""
        wanted = _ITEMS.where(ItemRow.tenant == tenant, ItemRow.owner == owner).order_by(ItemRow.position)
        return [StoredItem(*row) for row in await self._rows(wanted)]

    async def items_named(self, tenant: str, ids: Sequence[str]) -> dict[str, StoredItem]:
        """Items by their ids; of several with one id, the latest."""
        found: dict[str, StoredItem] = {}
        for first in range(0, len(ids), MOST_PARAMETERS):
            some = ids[first : first + MOST_PARAMETERS]
            wanted = _ITEMS.where(ItemRow.tenant == tenant, ItemRow.id.in_(some)).order_by(ItemRow.at)
            found |= {row[0]: StoredItem(*row) for row in await self._rows(wanted)}
        return found

    async def change(self, tenant: str, id: str, data: Mapping[str, Any]) -> None:
        """Replace an object's own data."""
        mine = (ObjectRow.tenant == tenant) & (ObjectRow.id == id)
        async with self._begin() as connection:
            await connection.execute(update(ObjectRow).where(mine).values(data=data, at=time.time()))

    async def append(self, tenant: str, owner: str, items: Sequence[StoredItem]) -> None:
        """Add items to an object that is still there."""
        async with self._begin() as connection:
            mine = (ObjectRow.tenant == tenant) & (ObjectRow.id == owner)
            touched = await connection.execute(update(ObjectRow).where(mine).values(at=time.time()))
            if not touched.rowcount:
                return
            # A write whose acknowledgement was lost is tried again.
            mine = (ItemRow.tenant == tenant) & (ItemRow.owner == owner)
            known = select(ItemRow.id).where(mine, ItemRow.id.in_([item.id for item in items]))
            there = set((await connection.execute(known)).scalars())
            items = [item for item in items if item.id not in there]
            last = select(func.max(ItemRow.position)).where(ItemRow.tenant == tenant, ItemRow.owner == owner)
            position = (await connection.execute(last)).scalar()
            await _add(connection, tenant, owner, 0 if position is None else position + 1, items)

    async def remove_item(self, tenant: str, owner: str, id: str) -> None:
        """Remove an object's items of one id."""
        mine = (ItemRow.tenant == tenant) & (ItemRow.owner == owner) & (ItemRow.id == id)
        async with self._begin() as connection:
            await connection.execute(delete(ItemRow).where(mine))

    async def remove(self, tenant: str, id: str) -> None:
        """Remove an object and its items."""
        async with self._begin() as connection:
            for statement in _gone(tenant, id):
                await connection.execute(statement)

    async def _rows(self, wanted: Select[*tuple[Any, ...]]) -> Sequence[Any]:
        async with self._begin() as connection:
            return (await connection.execute(wanted)).all()


_ITEMS = select(ItemRow.id, ItemRow.part, ItemRow.data)


def removed_with(key: SessionKey) -> tuple[Delete, Delete]:
    """What goes with a session."""
    mine = (ObjectRow.tenant == key.tenant) & (ObjectRow.session == key.session)
    return _items_of(mine, key.tenant), delete(ObjectRow).where(mine)


def erased_with(key: SessionKey) -> tuple[Delete, Delete]:
    """What goes with a session's text: conversations lose their items, responses all."""
    mine = (ObjectRow.tenant == key.tenant) & (ObjectRow.session == key.session)
    return _items_of(mine, key.tenant), delete(ObjectRow).where(mine, ObjectRow.kind == RESPONSE)


def erased_before(at: float) -> tuple[Delete, Delete]:
    """What goes with all text from before a Unix time."""
    return (
        delete(ItemRow).where(ItemRow.at < at),
        delete(ObjectRow).where(ObjectRow.at < at, ObjectRow.kind == RESPONSE),
    )


def unused_since(at: float) -> tuple[Delete, Delete]:
    """What is without a change since a Unix time and belongs to no session on record."""
    session = (SessionRow.tenant == ObjectRow.tenant) & (SessionRow.session == ObjectRow.session)
    alone = (ObjectRow.at < at) & ~exists().where(session)
    owned = (ItemRow.tenant == ObjectRow.tenant) & (ItemRow.owner == ObjectRow.id)
    return delete(ItemRow).where(exists().where(owned & alone)), delete(ObjectRow).where(alone)


def _gone(tenant: str, id: str) -> tuple[Delete, Delete]:
    return (
        delete(ItemRow).where(ItemRow.tenant == tenant, ItemRow.owner == id),
        delete(ObjectRow).where(ObjectRow.tenant == tenant, ObjectRow.id == id),
    )


def _items_of(objects: Any, tenant: str) -> Delete:
    return delete(ItemRow).where(
        ItemRow.tenant == tenant, ItemRow.owner.in_(select(ObjectRow.id).where(objects))
    )


async def _add(
    connection: AsyncConnection, tenant: str, owner: str, first: int, items: Sequence[StoredItem]
) -> None:
    now = time.time()
    rows = [
        {"tenant": tenant, "owner": owner, "position": position, "at": now, **vars(item)}
        for position, item in enumerate(items, first)
    ]
    if rows:
        await connection.execute(insert(ItemRow), rows)
