"""Data for machines in journal entries: why a step waits, and for how long."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    with op.batch_alter_table("events") as table:
        table.add_column(sa.Column("data", sa.Text))


def downgrade() -> None:
    """Take back."""
    with op.batch_alter_table("events") as table:
        table.drop_column("data")
