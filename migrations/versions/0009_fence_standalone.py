"""A session's end fences the worker that reads its standalone stream from an upstream.

Revision ID: 0009
Revises: 0008
Create Date: 2026-11-27
"""

from alembic import op

from mcp_pg_events.migrate import read_sql, verbatim

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(verbatim(read_sql("finish.sql")))
    # It replaces two of the functions for proxied sessions.
    op.execute(verbatim(read_sql("relay.sql")))


def downgrade() -> None:
    """Nothing to undo: these functions take what those of revision 0008 took."""
