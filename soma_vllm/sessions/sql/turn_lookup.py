"""The statements that find a turn by what a client sends: its transcript, or the id of a response.

Guarantees: nothing is found outside its tenant, and nothing of a session that is being removed; the number of a
statement's parameters does not grow with the transcript, nor its time with how many dialogues begin alike. Each
statement is built once: building it takes longer than asking it. Parameters are named as in `asked`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

from sqlalchemy import (
    JSON,
    BindParameter,
    CompoundSelect,
    Integer,
    Select,
    String,
    TableValuedAlias,
    bindparam,
    cast,
    column,
    func,
    literal,
    select,
    union_all,
)
from sqlalchemy.sql.expression import ColumnElement

from soma_vllm.sessions.sql.tables import CLOSED, SessionRow, TurnRow

Turn = Select[str, int, int]
"""Selects (session, seq, number)."""

_OF_THE_SAME = (TurnRow.tenant == SessionRow.tenant) & (TurnRow.session == SessionRow.session)


Hit = Select[str, int, int, str, bool]
"""Selects (session, seq, number, chain, whether the session stands there)."""

Hits = CompoundSelect[str, int, int, str, bool]


def asked(tenant: str, family: str, digests: Sequence[str], limit: int) -> dict[str, object]:
    """The parameters of `by_prefix_digests`."""
    return {"tenant": tenant, "family": family, "digests": json.dumps(list(digests)), "limit": limit}


@cache
def by_prefix_digests(dialect: str) -> Hits:
    """Turns with the first of these chains that there is: `limit` of sessions that stand there, and `limit` of
    any."""
    tenant, family, limit = _text("tenant"), _text("family"), bindparam("limit", type_=Integer)
    tried = _numbered(dialect)
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
    its_own = (SessionRow.tenant == tenant) & (SessionRow.family == family) & (SessionRow.phase != CLOSED)
    standing = select(SessionRow.session).where(its_own, SessionRow.chain == longest).limit(limit).subquery()
    itself = (TurnRow.tenant == tenant) & (TurnRow.session == standing.c.session)
    both = (
        _hits(True).join(standing, itself).where(TurnRow.chain == longest).limit(limit).subquery(),
        _hits(False)
        .join(SessionRow, _OF_THE_SAME)
        .where(in_family, TurnRow.chain == longest)
        .limit(limit)
        .subquery(),
    )
    return union_all(*(select(one) for one in both))


@cache
def by_ending() -> Select[str]:
    """Sessions whose last answer has one of the `digests`, a sequence of few; at most `limit`."""
    tenant, family = _text("tenant"), _text("family")
    its_own = (SessionRow.tenant == tenant) & (SessionRow.family == family) & (SessionRow.phase != CLOSED)
    ends = SessionRow.ending.in_(bindparam("digests", expanding=True))
    return select(SessionRow.session).where(its_own, ends).limit(bindparam("limit", type_=Integer))


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


def _hits(stands: bool) -> Hit:
    there = literal(stands).label("stands")
    return select(TurnRow.session, TurnRow.seq, TurnRow.number, TurnRow.chain, there)


def _text(name: str) -> BindParameter[str]:
    return bindparam(name, type_=String)


def _numbered(dialect: str) -> TableValuedAlias:
    """A table (key, value) of the `digests` in order, which are one parameter."""
    listed = _text("digests")
    value = column("value", String)
    if dialect == "sqlite":
        return func.json_each(listed).table_valued("key", value, name="tried")
    elements = func.json_array_elements_text(cast(listed, JSON))
    return elements.table_valued(value, with_ordinality="key", name="tried").render_derived()
