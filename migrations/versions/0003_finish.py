"""The ends of sessions and workers as functions, so that each is one statement.

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-26
"""

from alembic import op

from mcp_pg_events.migrate import read_sql, verbatim

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(verbatim(read_sql("finish.sql")))


def downgrade() -> None:
    op.execute("DROP FUNCTION end_worker(bigint, text, text, timestamptz, boolean)")
    op.execute("DROP FUNCTION holds_lock(bigint)")
    op.execute("DROP FUNCTION end_session(text, text, text, double precision, boolean, text, text)")
    # Schemas of revisions 0003 to 0008 that an earlier version made lack it.
    op.execute("DROP FUNCTION IF EXISTS close_standalone(text)")
    op.execute("DROP FUNCTION finish_calls(bigint[], text)")
