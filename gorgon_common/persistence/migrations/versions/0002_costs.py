"""Calls recorded by the library, and the accuracy of token estimates."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _org() -> sa.Column[int]:
    return sa.Column("org_id", sa.Integer, server_default="1", nullable=False)


def upgrade() -> None:
    """Apply."""
    op.create_table(
        "recorded_calls",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False),
        _org(),
        sa.Column("at", TIME, nullable=False),
        sa.Column("team", sa.String(100), nullable=False),
        sa.Column("workflow", sa.String(200), nullable=False),
        sa.Column("run", sa.String(200), nullable=True),
        sa.Column("step", sa.String(200), nullable=True),
        sa.Column("provider", sa.String(40), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("role", sa.String(100), nullable=True),
        sa.Column("input_tokens", sa.Integer, nullable=False),
        sa.Column("cache_read_tokens", sa.Integer, nullable=False),
        sa.Column("cache_write_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("reasoning_tokens", sa.Integer, nullable=False),
        sa.Column("cost_micro", sa.BigInteger, nullable=True),
        sa.Column("price_version", sa.String(60), nullable=True),
        sa.Column("latency_ms", sa.Integer, nullable=True),
        sa.Column("outcome", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_recorded_calls_at", "recorded_calls", ["at"])
    op.create_table(
        "token_ratios",
        sa.Column("target", sa.String(20), nullable=False),
        sa.Column("provider", sa.String(40), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        _org(),
        sa.Column("calls", sa.BigInteger, nullable=False),
        sa.Column("log_ratio", sa.Float(53), nullable=False),
        sa.Column("log_square", sa.Float(53), nullable=False),
        sa.Column("updated_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("target", "provider", "model"),
    )


def downgrade() -> None:
    """Take back."""
    op.drop_table("token_ratios")
    op.drop_table("recorded_calls")
