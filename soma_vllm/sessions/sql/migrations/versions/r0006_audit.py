"""Administrators' orders are on record."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """From 0005. Orders that were given before are not among them."""
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("who", sa.String(64), nullable=False),
        sa.Column("what", sa.String, nullable=False),
        sa.Column("request", sa.String(128)),
    )


def downgrade() -> None:
    """To 0005. The recorded orders go."""
    op.drop_table("audit")
