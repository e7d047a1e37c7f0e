"""The limiter's state if there is no Redis, and the limits set by people."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "limit_states",
        sa.Column("key", sa.String(300), nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("key"),
    )
    op.create_table(
        "limit_rules",
        sa.Column("provider", sa.String(100), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("provider", "model"),
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("limit_rules")
    op.drop_table("limit_states")
