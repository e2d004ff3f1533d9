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
    """To 0005. The recorded orders go, and with them what keys may choose, which 0005 does not read."""
    op.drop_table("audit")
    keys = sa.table("api_keys", sa.column("id", sa.String), sa.column("limits", sa.JSON))
    connection = op.get_bind()
    for key, limits in connection.execute(sa.select(keys.c.id, keys.c.limits)).all():
        kept = {name: value for name, value in limits.items() if name != "policies"}
        connection.execute(keys.update().where(keys.c.id == key).values(limits=kept))
