"""Events that are sent to runs, and the steps that wait for them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "run_events",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("run_id", sa.BigInteger, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("step_id", sa.BigInteger, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_run_events_run_id_name", "run_events", ["run_id", "name"])
    op.create_table(
        "event_waits",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("run_id", sa.BigInteger, nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("step_id"),
    )
    op.create_index("ix_event_waits_run_id", "event_waits", ["run_id"])


def downgrade() -> None:
    """Take back."""
    op.drop_table("event_waits")
    op.drop_table("run_events")
