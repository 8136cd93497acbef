"""Indexes for lists of sessions.

Revision ID: 0008
Revises: 0007
Create Date: 2026-11-27
"""

from alembic import op

from mcp_pg_events.migrate import verbatim

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

# Sessions are few beside events, so that a build takes a fraction of a second, during which none is opened. It does not
# wait long for those that work with them: whoever comes behind would wait too. Where they are too many for that,
# somebody has made the indexes concurrently before.
CHANGES = """
SET LOCAL lock_timeout = '3s';
CREATE INDEX IF NOT EXISTS sessions_created ON sessions (created_at, id);
CREATE INDEX IF NOT EXISTS sessions_opened ON sessions (created_at, id) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS sessions_owner ON sessions (owner, created_at, id) WHERE owner IS NOT NULL;
SET LOCAL lock_timeout = DEFAULT;
"""


def upgrade() -> None:
    op.execute(verbatim(CHANGES))


def downgrade() -> None:
    op.execute("DROP INDEX IF EXISTS sessions_owner, sessions_opened, sessions_created")
