"""Each run says which trace it is part of; the journal says when a step has started."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from gorgon_common.persistence.store import tick_function

revision = "0014"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    op.add_column("runs", sa.Column("trace_id", sa.String(32), nullable=True))
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(tick_function().replace("%", "%%"))


def downgrade() -> None:
    """Take back.  The function of this version goes on working: it writes no column that is gone."""
    op.drop_column("runs", "trace_id")
