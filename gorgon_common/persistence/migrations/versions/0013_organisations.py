"""Several organisations in one database: names that each may use for itself; who asked for a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Apply."""
    op.add_column("runs", sa.Column("actor", sa.String(200), nullable=True))
    op.create_index("ix_runs_org_id_id", "runs", ["org_id", "id"])
    _key("plans", "org_id", "hash")
    _key("shares", "org_id", "queue", "team")


def downgrade() -> None:
    """Take back.  Where several organisations use a name, the row of the first of them stays."""
    _first("plans", "hash")
    _key("plans", "hash")
    _first("shares", "queue", "team")
    _key("shares", "queue", "team")
    op.drop_index("ix_runs_org_id_id", "runs")
    op.drop_column("runs", "actor")


def _first(table: str, *names: str) -> None:
    same = " AND ".join(f"other.{name} = {table}.{name}" for name in names)
    op.execute(
        f"DELETE FROM {table} WHERE EXISTS (SELECT 1 FROM {table} other WHERE {same} AND other.org_id < {table}.org_id)"
    )


def _key(table: str, *names: str) -> None:
    """Give a table another primary key.  SQLite cannot change one, so the table is written anew."""
    if op.get_bind().dialect.name != "sqlite":
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT {table}_pkey, ADD PRIMARY KEY ({', '.join(names)})")
        return
    columns = {"plans": _plans, "shares": _shares}[table]()
    op.create_table(f"{table}_0013", *columns, sa.PrimaryKeyConstraint(*names))
    listed = ", ".join(column.name for column in columns)
    op.execute(f"INSERT INTO {table}_0013 ({listed}) SELECT {listed} FROM {table}")
    op.drop_table(table)
    op.rename_table(f"{table}_0013", table)


def _plans() -> list[sa.Column[object]]:
    return [
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
    ]


def _shares() -> list[sa.Column[object]]:
    return [
        sa.Column("queue", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("team", sa.String(100), nullable=False),
        sa.Column("org_id", sa.Integer, server_default="1", nullable=False),
        sa.Column("next_rank", sa.BigInteger, nullable=False),
    ]
