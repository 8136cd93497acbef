"""Retention raises floors in pages, and drops nothing for a ttl that only looks like one.

Revision ID: 0006
Revises: 0005
Create Date: 2026-11-26
"""

from alembic import op

from mcp_pg_events.migrate import read_sql, verbatim

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Two functions of this name could not be told apart by a call with two arguments, as older programs have it.
    op.execute("DROP FUNCTION IF EXISTS raise_floors(regclass, timestamptz)")
    op.execute(verbatim(read_sql("retention.sql")))


def downgrade() -> None:
    """Nothing to undo: these functions take what those of revision 0005 took."""
