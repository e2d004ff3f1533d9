"""What the session store is asked: events, the session that a request belongs to, and listings.

Guarantees: nothing is written; every question of a client's names its tenant; a session that is being
removed is not found and uses nothing, though it is listed, and its events can be read, until it is gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, Row, Select, case, func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from soma_vllm.sessions.sql.connections import connect
from soma_vllm.sessions.sql.outages import translated
from soma_vllm.sessions.sql.records import FACTS, AdapterRecord, LengthCount, Summary, TurnHit, TurnLocation
from soma_vllm.sessions.sql.schema import missing_tables, refuse_other_versions
from soma_vllm.sessions.sql.tables import (
    CLOSED,
    RETIRED,
    AdapterRow,
    EventRow,
    RecordRow,
    SessionRow,
    TextRow,
    TurnRow,
)
from soma_vllm.sessions.sql.turn_lookup import Turn, asked, by_ending, by_prefix_digests, by_response
from soma_vllm.types import Event, SessionKey

_KEYS = select(SessionRow.tenant, SessionRow.session)
_ADAPTER = ("tenant", "session", "name", "number", "path", "state", *FACTS)
_ADAPTERS = select(*(getattr(AdapterRow, column) for column in _ADAPTER))


class SessionReader:
    """The questions. Every one raises StoreUnavailable while the database is away."""

    def __init__(self, url: str) -> None:
        """Opens no connection yet.

        Raises:
            ConfigError: `url` is of no database that the store knows.
        """
        self._engine = connect(url)

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()

    async def events(self, key: SessionKey) -> list[Event]:
        """All events of a session in order, with the text that is still there; empty without such a session."""
        its_text = [getattr(TextRow, name) == getattr(EventRow, name) for name in ("tenant", "session", "seq")]
        return [
            Event(*row)
            for row in await self._rows(
                select(EventRow.kind, EventRow.at, EventRow.data, TextRow.data)
                .outerjoin_from(EventRow, TextRow, its_text[0] & its_text[1] & its_text[2])
                .where(of(EventRow, key))
                .order_by(EventRow.seq)
            )
        ]

    async def find(self, tenant: str, family: str, chains: Sequence[str], limit: int) -> list[TurnHit]:
        """Turns that a request may go on from: those with the longest chain among `chains`, longest first.

        At most `limit` of sessions whose transcript ends there, and `limit` of any.
        """
        wanted = by_prefix_digests(self._engine.dialect.name)
        rows = await self._rows(wanted, asked(tenant, family, chains, limit))
        return [
            TurnHit(TurnLocation(session, seq, number), chain, bool(stands))
            for session, seq, number, chain, stands in rows
        ]

    async def ending(self, tenant: str, family: str, endings: Sequence[str], limit: int) -> list[str]:
        """At most `limit` sessions whose last answer has one of these digests."""
        named = {"tenant": tenant, "family": family, "digests": list(endings), "limit": limit}
        return [name for (name,) in await self._rows(by_ending(), named)]

    async def of_response(self, tenant: str, response: str) -> TurnLocation | None:
        """The latest turn that a client may name so."""
        return await self._turn(by_response(tenant, response))

    async def users_of(self, adapter: str) -> list[SessionKey]:
        """Sessions that this adapter serves, closed ones left out."""
        return await self._keys(SessionRow.adapter == adapter, SessionRow.phase != CLOSED)

    async def served(self) -> list[tuple[SessionKey, str]]:
        """(session, its adapter) for all that an adapter serves, closed ones left out."""
        wanted = select(SessionRow.tenant, SessionRow.session, SessionRow.adapter)
        rows = await self._rows(wanted.where(SessionRow.adapter.is_not(None), SessionRow.phase != CLOSED))
        return [(SessionKey(tenant, session), str(adapter)) for tenant, session, adapter in rows]

    async def in_phase(self, phase: str) -> list[SessionKey]:
        """Sessions in this phase, over all tenants."""
        return await self._keys(SessionRow.phase == phase)

    async def family(self, tenant: str, family: str) -> list[SessionKey]:
        """A tenant's sessions of one family, or the branches of one that is known by its transcript."""
        its_own = SessionRow.tenant == tenant
        named = await self._keys(its_own, SessionRow.family == family)
        begun = SessionRow.session.startswith(f"{family}~", autoescape=True)
        return [*named, *await self._keys(its_own, SessionRow.family == "", begun)]

    async def idle_since(self, at: float, limit: int) -> list[SessionKey]:
        """At most `limit` sessions without an append since a Unix time, longest idle first; no closed ones."""
        idle = _KEYS.where(SessionRow.updated_at < at, SessionRow.phase != CLOSED)
        rows = await self._rows(idle.order_by(SessionRow.updated_at).limit(limit))
        return [SessionKey(*row) for row in rows]

    async def summaries(self, tenant: str | None, limit: int, after: float | None = None) -> list[Summary]:
        """At most `limit` sessions of one tenant or of all, the latest first; closed ones as well.

        `after` goes on where a page ended: it is the `updated_at` of that page's last summary.
        """
        named = (
            SessionRow.family,
            SessionRow.phase,
            SessionRow.turns,
            SessionRow.adapter,
            SessionRow.updated_at,
        )
        wanted = _KEYS.add_columns(*named).order_by(SessionRow.updated_at.desc()).limit(limit)
        if tenant is not None:
            wanted = wanted.where(SessionRow.tenant == tenant)
        if after is not None:
            wanted = wanted.where(SessionRow.updated_at < after)
        return [Summary(SessionKey(*row[:2]), *row[2:]) for row in await self._rows(wanted)]

    async def lengths(self, over_before: float) -> list[LengthCount]:
        """Dialogues of every tenant by their number of turns.

        Over are those without an append since a Unix time. The others count with the turns that they had then,
        and with one more where one came since: what follows the turns since then is not known yet.
        """
        dialogue = case((SessionRow.family == "", SessionRow.session), else_=SessionRow.family)
        over = (
            select(SessionRow.tenant, func.max(SessionRow.turns).label("turns"))
            .where(SessionRow.turns > 0)
            .group_by(SessionRow.tenant, dialogue)
            .having(func.max(SessionRow.updated_at) < over_before)
        )
        going = (
            select(SessionRow.tenant, dialogue.label("dialogue"))
            .group_by(SessionRow.tenant, dialogue)
            .having(func.max(SessionRow.updated_at) >= over_before)
            .subquery()
        )
        then = func.max(case((TurnRow.at < over_before, TurnRow.number), else_=0))
        known = case((func.max(TurnRow.number) > then, then + 1), else_=then)
        live = (
            select(SessionRow.tenant, known.label("turns"))
            .join(going, (going.c.tenant == SessionRow.tenant) & (going.c.dialogue == dialogue))
            .join(TurnRow, (TurnRow.tenant == SessionRow.tenant) & (TurnRow.session == SessionRow.session))
            .group_by(SessionRow.tenant, dialogue)
            .having(then > 0)
        )
        return [*await self._counted(over, over=True), *await self._counted(live, over=False)]

    async def _counted(self, dialogues: Select[str, int], *, over: bool) -> list[LengthCount]:
        """Dialogues of so many turns each, counted."""
        one = dialogues.subquery()
        wanted = select(one.c.tenant, one.c.turns, func.count()).group_by(one.c.tenant, one.c.turns)
        return [LengthCount(tenant, turns, over, count) for tenant, turns, count in await self._rows(wanted)]

    async def live(self, tenant: str) -> int:
        """A tenant's dialogues: sessions that are not closed, and no branches of others."""
        named = SessionRow.family == SessionRow.session
        by_transcript = (SessionRow.family == "") & SessionRow.session.not_like("%~%")
        return await self._count(SessionRow.tenant == tenant, SessionRow.phase != CLOSED, named | by_transcript)

    async def count(self) -> int:
        """Sessions on record, over all tenants."""
        return await self._count()

    async def keys(self, tenant: str | None = None) -> list[SessionKey]:
        """Every session on record, of one tenant or of all, in the order of their names."""
        found = await self._keys(*(() if tenant is None else (SessionRow.tenant == tenant,)))
        # Sorted here: databases differ in the order of letters.
        return sorted(found, key=lambda key: (key.tenant, key.session))

    async def record_id(self) -> str:
        """Which record this is: random, and the same wherever its database is opened from or moved to."""
        ((found,),) = await self._rows(select(RecordRow.id))
        return str(found)

    async def adapter(self, name: str) -> AdapterRecord | None:
        """The adapter of this name."""
        rows = await self._rows(_ADAPTERS.where(AdapterRow.name == name))
        return _adapter(rows[0]) if rows else None

    async def adapters(self, tenant: str | None = None, retired: bool = True) -> list[AdapterRecord]:
        """Adapters on record, of one tenant or of all, in the order of their numbers.

        `retired=False` leaves out those whose files are gone, unless some session still names them.
        """
        wanted = _ADAPTERS
        if not retired:
            named = select(SessionRow.adapter).where(SessionRow.adapter.is_not(None))
            wanted = wanted.where((AdapterRow.state != RETIRED) | AdapterRow.name.in_(named))
        if tenant is not None:
            wanted = wanted.where(AdapterRow.tenant == tenant)
        return [_adapter(row) for row in await self._rows(wanted.order_by(AdapterRow.number))]

    async def adapters_used(self) -> dict[str, float]:
        """Adapters that serve sessions, with the Unix time of those sessions' last append."""
        latest = select(SessionRow.adapter, func.max(SessionRow.updated_at)).group_by(SessionRow.adapter)
        serving = latest.where(SessionRow.adapter.is_not(None), SessionRow.phase != CLOSED)
        return {str(name): float(at) for name, at in await self._rows(serving)}

    async def missing_tables(self) -> list[str]:
        """Tables of the session store that this database lacks."""
        async with self._connection() as connection:
            return await connection.run_sync(missing_tables)

    async def refuse_other_versions(self) -> None:
        """Raise ConfigError where this database's tables are not the ones that this code reads."""
        async with self._connection() as connection:
            await connection.run_sync(refuse_other_versions)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[AsyncConnection]:
        with translated():
            async with self._engine.connect() as connection:
                yield connection

    async def _rows(
        self,
        wanted: Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]],
        parameters: Mapping[str, object] | None = None,
    ) -> Sequence[Row[*tuple[Any, ...]]]:
        async with self._connection() as connection:
            return (await connection.execute(wanted, parameters)).all()

    async def _keys(self, *conditions: ColumnElement[bool]) -> list[SessionKey]:
        return [SessionKey(*row) for row in await self._rows(_KEYS.where(*conditions))]

    async def _count(self, *conditions: ColumnElement[bool]) -> int:
        ((count,),) = await self._rows(select(func.count()).select_from(SessionRow).where(*conditions))
        return int(count)

    async def _turn(self, wanted: Turn) -> TurnLocation | None:
        rows = await self._rows(wanted)
        return TurnLocation(*rows[0]) if rows else None


def _adapter(row: Row[*tuple[Any, ...]]) -> AdapterRecord:
    return AdapterRecord(SessionKey(*row[:2]), *row[2:])


def of(table: type[Any], key: SessionKey) -> ColumnElement[bool]:
    """The condition that a row of this table belongs to a session."""
    belongs: ColumnElement[bool] = (table.tenant == key.tenant) & (table.session == key.session)
    return belongs
