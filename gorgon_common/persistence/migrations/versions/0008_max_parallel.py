"""Limits the slow steps of a run in progress: claims of such runs are counted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("runs", sa.Column("max_parallel", sa.Integer, nullable=True))
    op.create_table(
        "run_slots",
        sa.Column("run_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("holders", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_table(
        "held_steps",
        sa.Column("run_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.PrimaryKeyConstraint("run_id", "step_id"),
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("held_steps")
    op.drop_table("run_slots")
    op.drop_column("runs", "max_parallel")
