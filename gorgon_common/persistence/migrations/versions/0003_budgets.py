"""Budgets: limits, reservations, and every change of an account.

Written out and frozen.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
IDS = postgresql.ARRAY(sa.BigInteger).with_variant(sa.JSON(), "sqlite")


def _org() -> sa.Column[int]:
    return sa.Column("org_id", sa.Integer, server_default="1", nullable=False)


def _amount(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, server_default="0", nullable=False)


def upgrade() -> None:
    """Apply."""
    _limits()
    _ledger()


def _limits() -> None:
    op.create_table(
        "budgets",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False),
        _org(),
        sa.Column("scope", sa.String(20), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("period", sa.String(10), nullable=False),
        sa.Column("timezone", sa.String(64), nullable=False),
        sa.Column("usd_limit", sa.BigInteger, nullable=True),
        sa.Column("token_limit", sa.BigInteger, nullable=True),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("org_id", "scope", "name", "period", name="uq_budgets_org_id_scope_name_period"),
    )
    op.create_table(
        "budget_periods",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False),
        _org(),
        sa.Column("key", sa.String(400), nullable=False),
        sa.Column("budget_id", sa.BigInteger, nullable=True),
        sa.Column("level", sa.SmallInteger, nullable=False),
        sa.Column("label", sa.String(400), nullable=False),
        sa.Column("starts_at", TIME, nullable=True),
        sa.Column("ends_at", TIME, nullable=True),
        sa.Column("usd_limit", sa.BigInteger, nullable=True),
        sa.Column("usd_wall", sa.BigInteger, nullable=True),
        _amount("usd_spent"),
        _amount("usd_reserved"),
        _amount("usd_overrun"),
        sa.Column("token_limit", sa.BigInteger, nullable=True),
        sa.Column("token_wall", sa.BigInteger, nullable=True),
        _amount("token_spent"),
        _amount("token_reserved"),
        _amount("token_overrun"),
        sa.Column("alerted", sa.SmallInteger, server_default="0", nullable=False),
        sa.Column("waited_for", sa.Boolean, server_default="0", nullable=False),
        sa.CheckConstraint("usd_reserved >= 0 AND usd_spent + usd_reserved <= usd_wall", name="usd_never_over"),
        sa.CheckConstraint(
            "token_reserved >= 0 AND token_spent + token_reserved <= token_wall", name="tokens_never_over"
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("key", name="uq_budget_periods_key"),
        postgresql_with={"fillfactor": 50},
    )
    op.create_index("ix_budget_periods_budget", "budget_periods", ["budget_id"])
    op.create_table(
        "budget_waits",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        _org(),
        sa.Column("period_id", sa.BigInteger, nullable=False),
        sa.Column("patient", sa.Boolean, nullable=False),
        sa.Column("usd", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("step_id"),
    )
    op.create_index("ix_budget_waits_period", "budget_waits", ["period_id", "step_id"])


def _ledger() -> None:
    op.create_table(
        "reservations",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("token", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("ordinal", sa.SmallInteger, autoincrement=False, nullable=False),
        _org(),
        sa.Column("at", TIME, nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("usd", sa.BigInteger, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("max_tokens", sa.Integer, nullable=False),
        sa.Column("usd_posted", sa.BigInteger, nullable=True),
        sa.Column("tokens_posted", sa.BigInteger, nullable=True),
        sa.Column("accounts", IDS, nullable=False),
        sa.PrimaryKeyConstraint("step_id", "token", "ordinal"),
        postgresql_with={"fillfactor": 70},
    )
    op.create_index(
        "ix_reservations_open",
        "reservations",
        ["step_id"],
        postgresql_where=sa.text("state = 0"),
        sqlite_where=sa.text("state = 0"),
    )
    op.create_table(
        "postings",
        sa.Column("seq", BIG_KEY, autoincrement=True, nullable=False),
        _org(),
        sa.Column("period_id", sa.BigInteger, nullable=False),
        sa.Column("step_id", sa.BigInteger, nullable=True),
        sa.Column("token", sa.Integer, nullable=True),
        sa.Column("ordinal", sa.SmallInteger, nullable=True),
        sa.Column("kind", sa.SmallInteger, nullable=False),
        sa.Column("usd_reserved", sa.BigInteger, nullable=False),
        sa.Column("usd_spent", sa.BigInteger, nullable=False),
        sa.Column("usd_overrun", sa.BigInteger, nullable=False),
        sa.Column("token_reserved", sa.BigInteger, nullable=False),
        sa.Column("token_spent", sa.BigInteger, nullable=False),
        sa.Column("token_overrun", sa.BigInteger, nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("seq"),
    )


def downgrade() -> None:
    """Take back."""
    for name in ("postings", "reservations", "budget_waits", "budget_periods", "budgets"):
        op.drop_table(name)
