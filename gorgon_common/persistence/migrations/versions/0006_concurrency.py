"""Concurrency keys: which runs hold them, and which wait for them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)
BIG_KEY = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply."""
    op.add_column("runs", sa.Column("key_id", sa.BigInteger, nullable=True))
    op.add_column("runs", sa.Column("key_at", TIME, nullable=True))
    op.create_table(
        "concurrency_keys",
        sa.Column("id", BIG_KEY, autoincrement=True, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("target", sa.String(20), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("shown", sa.String(200), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("org_id", "target", "digest", name="uq_concurrency_keys_org_id_target_digest"),
    )
    op.create_table(
        "concurrency_places",
        sa.Column("run_id", sa.BigInteger, autoincrement=False, nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("key_id", sa.BigInteger, nullable=False),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("most", sa.Integer, nullable=False),
        sa.Column("on_conflict", sa.String(20), nullable=False),
        sa.Column("timeout", sa.Float(53), nullable=True),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_index("ix_concurrency_places_key", "concurrency_places", ["key_id", "run_id"])


def downgrade() -> None:
    """Take back."""
    op.drop_table("concurrency_places")
    op.drop_table("concurrency_keys")
    op.drop_column("runs", "key_at")
    op.drop_column("runs", "key_id")
