"""The first tables, and the engine's transaction on PostgreSQL."""

from __future__ import annotations

from alembic import op

from gorgon_common.persistence.store import tick_function
from gorgon_common.persistence.tables import metadata

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply."""
    metadata.create_all(op.get_bind())
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql(tick_function().replace("%", "%%"))


def downgrade() -> None:
    """Take back."""
    if op.get_bind().dialect.name == "postgresql":
        op.get_bind().exec_driver_sql("DROP FUNCTION gorgon_tick")
    metadata.drop_all(op.get_bind())
