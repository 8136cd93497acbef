"""Workers are told of readers elsewhere, and need not look for them after each commit.

Revision ID: 0004
Revises: 0003
Create Date: 2026-11-26
"""

from alembic import op

from mcp_pg_events.migrate import read_sql, verbatim

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(verbatim(read_sql("tell_owner.sql")))


def downgrade() -> None:
    op.execute("DROP TRIGGER tell_owner ON streams")
    op.execute("DROP FUNCTION tell_owner()")
