"""Sessions are found by where their transcripts end, in a time that does not grow with the turns on record."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """From 0004. Sessions that are on record already are found by their last answer once they have gone on."""
    op.add_column("sessions", sa.Column("ending", sa.String(16)))
    op.create_index("ix_sessions_chain", "sessions", ["tenant", "family", "chain"])
    op.create_index("ix_sessions_ending", "sessions", ["tenant", "family", "ending"])
    op.drop_index("ix_turns_link", "turns")


def downgrade() -> None:
    """To 0004."""
    op.create_index("ix_turns_link", "turns", ["tenant", "family", "link"])
    op.drop_index("ix_sessions_ending", "sessions")
    op.drop_index("ix_sessions_chain", "sessions")
    op.drop_column("sessions", "ending")
