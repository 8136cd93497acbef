"""Sessions that live on one worker, and letters that carry a request.

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-26
"""

from alembic import op

from mcp_pg_events.migrate import verbatim

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

CHANGES = """
ALTER TABLE sessions ADD COLUMN worker bigint;
COMMENT ON COLUMN sessions.worker IS
    'The worker that the session lives on and ends with; null where any serves it.';
CREATE INDEX sessions_bound ON sessions (worker) WHERE ended_at IS NULL AND worker IS NOT NULL;

ALTER TABLE inbox ADD COLUMN stream bigint;
COMMENT ON COLUMN inbox.stream IS 'The stream that was opened for it, where the message is a request.';
"""


def upgrade() -> None:
    op.execute(verbatim(CHANGES))


def downgrade() -> None:
    op.execute("ALTER TABLE inbox DROP COLUMN stream")
    op.execute("DROP INDEX sessions_bound")
    op.execute("ALTER TABLE sessions DROP COLUMN worker")
