"""Claims check the worker's lease; the worker deaths that a step has seen are stored."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Apply."""
    op.add_column("workers", sa.Column("beat_at", TIME, nullable=True))
    op.add_column("workers", sa.Column("retired", sa.Boolean, server_default="0", nullable=False))
    op.create_table(
        "step_deaths",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("token", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("owner", sa.Integer, nullable=True),
        sa.Column("chance", sa.Float(53), nullable=False),
        sa.Column("alone", sa.Boolean, nullable=False),
        sa.Column("why", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("step_id", "token"),
    )


def downgrade() -> None:
    """Take back.  0008 must be installed with its own code."""
    op.drop_table("step_deaths")
    op.drop_column("workers", "retired")
    op.drop_column("workers", "beat_at")
