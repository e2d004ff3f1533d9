"""Turns are found by their last exchange alone, for clients that drop the oldest ones."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """From 0001. Turns that are on record already are not found so."""
    op.add_column("turns", sa.Column("link", sa.String(32)))
    op.create_index("ix_turns_link", "turns", ["tenant", "family", "link"])


def downgrade() -> None:
    """To 0001."""
    op.drop_index("ix_turns_link", "turns")
    op.drop_column("turns", "link")
