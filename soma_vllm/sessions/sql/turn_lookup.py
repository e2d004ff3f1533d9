"""The statements that find a turn by what a client sends: its transcript, or the id of a response.

Guarantees: nothing is found outside its tenant, and nothing of a session that is being removed; the number of a
statement's parameters does not grow with the transcript.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from sqlalchemy import JSON, Select, String, TableValuedAlias, cast, column, func, literal, select
from sqlalchemy.sql.expression import ColumnElement

from soma_vllm.sessions.sql.tables import CLOSED, SessionRow, TurnRow

Turn = Select[str, int, int]
"""Selects (session, seq, number)."""

_OF_THE_SAME = (TurnRow.tenant == SessionRow.tenant) & (TurnRow.session == SessionRow.session)


def by_prefix_digests(dialect: str, tenant: str, family: str, chains: Sequence[str]) -> Turn:
    """The turn with the first of these chains that there is.

    Of several, one of a session that stands there, then one of the session that was appended to last.
    """
    tried = _numbered(dialect, chains)
    in_family = (TurnRow.tenant == tenant) & (TurnRow.family == family) & (SessionRow.phase != CLOSED)
    # Not EXISTS: without statistics PostgreSQL would join all the tenant's turns before it looks for one chain.
    there = select(TurnRow.seq).join(SessionRow, _OF_THE_SAME).where(in_family, TurnRow.chain == tried.c.value)
    longest: ColumnElement[str] = (
        select(tried.c.value)
        .where(there.limit(1).scalar_subquery().is_not(None))
        .order_by(tried.c.key)
        .limit(1)
        .scalar_subquery()
    )
    return (
        _turns()
        .where(in_family, TurnRow.chain == longest)
        .order_by((SessionRow.chain == TurnRow.chain).desc(), SessionRow.updated_at.desc(), TurnRow.seq.desc())
        .limit(1)
    )


def by_exchange_digest(tenant: str, family: str, link: str, limit: int) -> Select[str]:
    """Sessions whose last turn ends with this exchange, the one that was appended to last first."""
    return (
        select(SessionRow.session)
        .join(TurnRow, _OF_THE_SAME)
        .where(TurnRow.tenant == tenant, TurnRow.family == family, TurnRow.link == link)
        .where(SessionRow.phase != CLOSED, SessionRow.chain == TurnRow.chain)
        .group_by(SessionRow.session, SessionRow.updated_at)
        .order_by(SessionRow.updated_at.desc())
        .limit(limit)
    )


def by_response(tenant: str, response: str) -> Turn:
    """The latest turn of this id."""
    return (
        _turns()
        .where(TurnRow.tenant == tenant, TurnRow.response == response, SessionRow.phase != CLOSED)
        .order_by(TurnRow.at.desc(), TurnRow.seq.desc())
        .limit(1)
    )


def _turns() -> Turn:
    return select(TurnRow.session, TurnRow.seq, TurnRow.number).join(SessionRow, _OF_THE_SAME)


def _numbered(dialect: str, values: Sequence[str]) -> TableValuedAlias:
    """A table (key, value) of these values in order, as one parameter."""
    listed = literal(json.dumps(list(values)), String)
    value = column("value", String)
    if dialect == "sqlite":
        return func.json_each(listed).table_valued("key", value, name="tried")
    elements = func.json_array_elements_text(cast(listed, JSON))
    return elements.table_valued(value, with_ordinality="key", name="tried").render_derived()
