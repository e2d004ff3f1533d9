"""Responses and conversations can be retrieved."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0002"


def upgrade() -> None:
    """From 0002. Responses that were given before are not among them."""
    op.create_table(
        "objects",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("id", sa.String, primary_key=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("session", sa.String, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
    )
    op.create_index("ix_objects_session", "objects", ["tenant", "session"])
    op.create_index("ix_objects_at", "objects", ["at"])
    op.create_table(
        "items",
        sa.Column("tenant", sa.String(64), primary_key=True),
        sa.Column("owner", sa.String, primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("id", sa.String, nullable=False),
        sa.Column("part", sa.String(16), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
    )
    op.create_index("ix_items_id", "items", ["tenant", "id"])
    op.create_index("ix_items_at", "items", ["at"])
