"""The record has an id of its own, and is the index of the adapters that it published."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

FACTS = (
    ("version", sa.Integer),
    ("base_model", sa.String),
    ("rank", sa.Integer),
    ("size_bytes", sa.BigInteger),
    ("created", sa.Float),
)


def upgrade() -> None:
    """From 0002. What is known of the adapters is read from their files by the next server that starts."""
    record = op.create_table("record", sa.Column("id", sa.String(32), primary_key=True))
    op.bulk_insert(record, [{"id": secrets.token_hex(16)}])
    for name, kind in FACTS:
        op.add_column("adapters", sa.Column(name, kind))


def downgrade() -> None:
    """To 0002. A later upgrade gives the record another id; the adapters on record stay its own."""
    for name, _ in FACTS:
        op.drop_column("adapters", name)
    op.drop_table("record")
