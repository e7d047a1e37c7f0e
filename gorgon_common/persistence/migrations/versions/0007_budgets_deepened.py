"""Budgets: waiting steps keep their place, alerts, paid-for conversations; an index of calls by time.

Written out and frozen.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply."""
    op.add_column("budget_waits", sa.Column("woken", sa.Boolean, server_default="0", nullable=False))
    op.add_column("budget_waits", sa.Column("until", TIME, nullable=True))
    op.create_table(
        "budget_alerts",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("period_id", sa.BigInteger, nullable=False),
        sa.Column("run_id", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(30), nullable=False),
        sa.Column("mark", sa.SmallInteger, nullable=True),
        sa.Column("at", TIME, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("told_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    untold = sa.text("told_at IS NULL")
    op.create_index("ix_budget_alerts_untold", "budget_alerts", ["id"], postgresql_where=untold, sqlite_where=untold)
    op.create_table(
        "conversations",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("step_id"),
    )
    op.create_index("ix_ledger_at", "ledger", ["at"], postgresql_using="brin")


def downgrade() -> None:
    """Take back."""
    op.drop_index("ix_ledger_at", "ledger")
    op.drop_table("conversations")
    op.drop_table("budget_alerts")
    op.drop_column("budget_waits", "until")
    op.drop_column("budget_waits", "woken")
