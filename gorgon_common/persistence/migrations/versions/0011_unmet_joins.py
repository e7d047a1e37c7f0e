"""A step records whether a dependency has ended without success, so that joins read nothing if all succeeded."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply.  Steps that already wait may have such a dependency, so they are marked."""
    op.add_column("steps", sa.Column("unmet", sa.Boolean, server_default="0", nullable=False))
    op.execute(sa.text("UPDATE steps SET unmet = :yes WHERE status < 5").bindparams(yes=True))


def downgrade() -> None:
    """Take back."""
    op.drop_column("steps", "unmet")
