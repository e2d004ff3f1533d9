"""Sessions, their events, texts, turns and adapters; API keys.

Types are spelt out here, not taken from `tables.py`: a step stays what it was when the tables move on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """From nothing."""
    op.create_table(
        "sessions",
        *_key(),
        sa.Column("family", sa.String, nullable=False),
        sa.Column("phase", sa.String(32), nullable=False),
        sa.Column("chain", sa.String(64), nullable=False),
        sa.Column("turns", sa.Integer, nullable=False),
        sa.Column("adapter", sa.String),
        sa.Column("updated_at", sa.Float, nullable=False),
    )
    op.create_index("ix_sessions_updated_at", "sessions", ["updated_at"])
    op.create_index("ix_sessions_tenant", "sessions", ["tenant", "updated_at"])
    op.create_index("ix_sessions_adapter", "sessions", ["adapter"])
    op.create_table(
        "events",
        *_key("seq"),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
    )
    op.create_table(
        "texts",
        *_key("seq"),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
    )
    op.create_index("ix_texts_at", "texts", ["at"])
    op.create_table(
        "turns",
        *_key("seq", "number"),
        sa.Column("family", sa.String, nullable=False),
        sa.Column("chain", sa.String(64), nullable=False),
        sa.Column("response", sa.String),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.create_index("ix_turns_chain", "turns", ["tenant", "family", "chain"])
    op.create_index("ix_turns_response", "turns", ["tenant", "response"])
    op.create_table(
        "adapters",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("session", sa.String, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("path", sa.String, nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("updated_at", sa.Float, nullable=False),
    )
    op.create_index("ix_adapters_session", "adapters", ["tenant", "session"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("limits", sa.JSON, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("revoked_at", sa.Float),
    )


def _key(*numbers: str) -> Iterator[sa.Column[Any]]:
    """A session's name, and numbers within it, as primary key."""
    yield sa.Column("tenant", sa.String(64), primary_key=True)
    yield sa.Column("session", sa.String, primary_key=True)
    for number in numbers:
        yield sa.Column(number, sa.Integer, primary_key=True, autoincrement=False)
