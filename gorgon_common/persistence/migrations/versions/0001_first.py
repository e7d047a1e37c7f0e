"""The first tables, and the engine's transaction on PostgreSQL.

Written out and frozen: later changes of `tables` are made by later migrations.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
ROWS = postgresql.ARRAY(sa.Integer).with_variant(sa.JSON(), "sqlite")


def _org() -> sa.Column[int]:
    return sa.Column("org_id", sa.Integer, server_default="1", nullable=False)


def upgrade() -> None:
    """Apply."""
    _runs()
    _journal()
    _traffic()


def _runs() -> None:
    """Plans, runs, steps and their results."""
    op.create_table(
        "plans",
        sa.Column("hash", sa.String(64), nullable=False),
        _org(),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.PrimaryKeyConstraint("hash"),
    )
    op.create_table(
        "runs",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False),
        _org(),
        sa.Column("public_id", sa.String(40), nullable=False),
        sa.Column("team", sa.String(100), nullable=False),
        sa.Column("workflow", sa.String(200), nullable=False),
        sa.Column("plan_hash", sa.String(64), nullable=False),
        sa.Column("inputs", sa.Text, nullable=False),
        sa.Column("target", sa.String(20), nullable=False),
        sa.Column("home", sa.String(100), server_default="", nullable=False),
        sa.Column("root_id", sa.BigInteger, nullable=False),
        sa.Column("resumed_from", sa.BigInteger, nullable=True),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("cancelled", sa.Boolean, nullable=False),
        sa.Column("next_row", sa.Integer, nullable=False),
        sa.Column("idempotency_key", sa.String(200), nullable=True),
        sa.Column("request_hash", sa.String(64), nullable=True),
        sa.Column("outputs", sa.Text, nullable=True),
        sa.Column("error", sa.Text, nullable=True),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("deadline", TIME, nullable=True),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("org_id", "idempotency_key", name="uq_runs_org_id_idempotency_key"),
        sa.UniqueConstraint("public_id", name="uq_runs_public_id"),
    )
    op.create_index("ix_runs_live", "runs", ["status"])
    op.create_table(
        "steps",
        sa.Column("id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("due", TIME, nullable=True),
        _org(),
        sa.Column("token", sa.Integer, nullable=False),
        sa.Column("owner", sa.Integer, nullable=True),
        sa.Column("node", sa.Integer, nullable=False),
        sa.Column("deps_left", sa.Integer, nullable=False),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("attempt", sa.SmallInteger, nullable=False),
        sa.Column("crashes", sa.SmallInteger, nullable=False),
        sa.Column("weight", sa.SmallInteger, nullable=False),
        sa.Column("queue", sa.SmallInteger, nullable=False),
        sa.Column("grouped", sa.Boolean, nullable=False),
        sa.Column("carried", sa.Boolean, nullable=False),
        sa.Column("halted", sa.Boolean, server_default="0", nullable=False),
        sa.Column("parent", sa.Integer, nullable=True),
        sa.Column("position", sa.Integer, nullable=True),
        sa.Column("window_next", sa.Integer, nullable=True),
        sa.Column("window_end", sa.Integer, nullable=True),
        sa.Column("successors", ROWS, nullable=False),
        sa.PrimaryKeyConstraint("id"),
        postgresql_with={"fillfactor": 70},
    )
    op.create_table(
        "checkpoints",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        _org(),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("attempts", sa.SmallInteger, nullable=False),
        sa.Column("started_at", TIME, nullable=True),
        sa.Column("finished_at", TIME, nullable=True),
        sa.Column("output", sa.Text, nullable=True),
        sa.Column("detail", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("step_id"),
    )
    op.create_table(
        "blobs",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        _org(),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("step_id"),
    )
    op.create_table(
        "fingerprints",
        sa.Column("root_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        _org(),
        sa.Column("step_id", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("root_id", "hash"),
    )
    op.create_table(
        "expansions",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("round", sa.Integer, autoincrement=False, nullable=False),
        _org(),
        sa.Column("phase", sa.String(10), nullable=False),
        sa.Column("base", sa.Integer, nullable=False),
        sa.Column("count", sa.Integer, nullable=False),
        sa.Column("reduce", sa.Integer, nullable=True),
        sa.Column("items", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("step_id", "round"),
    )


def _journal() -> None:
    """Money and history."""
    op.create_table(
        "ledger",
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("token", sa.Integer, autoincrement=False, nullable=False),
        sa.Column("ordinal", sa.SmallInteger, autoincrement=False, nullable=False),
        _org(),
        sa.Column("at", TIME, nullable=False),
        sa.Column("provider", sa.String(40), nullable=False),
        sa.Column("model", sa.String(200), nullable=False),
        sa.Column("role", sa.String(100), nullable=True),
        sa.Column("attempt", sa.SmallInteger, nullable=False),
        sa.Column("input_tokens", sa.Integer, nullable=False),
        sa.Column("cache_read_tokens", sa.Integer, nullable=False),
        sa.Column("cache_write_tokens", sa.Integer, nullable=False),
        sa.Column("output_tokens", sa.Integer, nullable=False),
        sa.Column("reasoning_tokens", sa.Integer, nullable=False),
        sa.Column("cost_micro", sa.BigInteger, nullable=True),
        sa.Column("price_version", sa.String(60), nullable=True),
        sa.Column("latency_ms", sa.Integer, nullable=False),
        sa.Column("outcome", sa.String(40), nullable=False),
        sa.Column("request_id", sa.String(200), nullable=True),
        sa.PrimaryKeyConstraint("step_id", "token", "ordinal"),
    )
    op.create_table(
        "events",
        sa.Column("seq", BIG_KEY, autoincrement=True, nullable=False),
        sa.Column("run_id", sa.BigInteger, nullable=False),
        sa.Column("row", sa.Integer, nullable=True),
        _org(),
        sa.Column("kind", sa.String(30), nullable=False),
        sa.Column("at", TIME, nullable=False),
        sa.Column("message", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("seq"),
    )
    op.create_index("ix_events_run", "events", ["run_id", "seq"])


def _traffic() -> None:
    """Workers, and the steps that wait for them."""
    op.create_table(
        "workers",
        sa.Column("id", sa.Integer, autoincrement=True, nullable=False),
        _org(),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("target", sa.String(20), nullable=False),
        sa.Column("home", sa.String(100), nullable=False),
        sa.Column("queues", sa.String(200), nullable=False),
        sa.Column("slots", sa.Integer, nullable=False),
        sa.Column("started_at", TIME, nullable=False),
        sa.Column("lease_until", TIME, nullable=False),
        sa.Column("reaped", sa.Boolean, nullable=False),
        sa.Column("watermarks", sa.Text, nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "backlog",
        sa.Column("queue", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("rank", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("step_id", sa.BigInteger, autoincrement=False, nullable=False),
        _org(),
        sa.PrimaryKeyConstraint("queue", "rank", "step_id"),
    )
    op.create_table(
        "shares",
        sa.Column("queue", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("team", sa.String(100), nullable=False),
        _org(),
        sa.Column("next_rank", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("queue", "team"),
    )
    op.create_table(
        "leaders",
        sa.Column("name", sa.String(40), nullable=False),
        _org(),
        sa.Column("owner", sa.String(80), nullable=False),
        sa.Column("until", TIME, nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )


def downgrade() -> None:
    """Take back."""
    for table in (
        "leaders", "shares", "backlog", "workers", "events", "ledger", "expansions", "fingerprints", "blobs",
        "checkpoints", "steps", "runs", "plans",
    ):  # fmt: skip
        op.drop_table(table)
