"""When a stream ended, and what leaves with a partition.

Revision ID: 0005
Revises: 0004
Create Date: 2026-11-26
"""

from alembic import op

from mcp_pg_events.migrate import read_sql, verbatim

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

CHANGES = """
ALTER TABLE streams ADD COLUMN ended_at timestamptz;
COMMENT ON COLUMN streams.ended_at IS 'When its final was stored; null while the stream is open.';
UPDATE streams SET ended_at = now() WHERE final_seq IS NOT NULL;
CREATE INDEX streams_ended ON streams (ended_at) WHERE ended_at IS NOT NULL;
-- Workers of an earlier revision do not say when. The retention job does for them.
CREATE INDEX streams_unsaid ON streams (number) WHERE final_seq IS NOT NULL AND ended_at IS NULL;
CREATE INDEX sessions_ended ON sessions (ended_at) WHERE ended_at IS NOT NULL;
CREATE INDEX sessions_seen ON sessions (seen_at) WHERE ended_at IS NULL;
"""


def upgrade() -> None:
    op.execute(verbatim(CHANGES))
    op.execute(verbatim(read_sql("finish.sql")))
    op.execute(verbatim(read_sql("retention.sql")))


def downgrade() -> None:
    op.execute("DROP FUNCTION drop_expired(interval, integer)")
    op.execute("DROP FUNCTION remove_rows(timestamptz, interval, text, integer)")
    op.execute("DROP FUNCTION IF EXISTS raise_floors(regclass, timestamptz, bigint, integer)")
    op.execute("DROP FUNCTION IF EXISTS raise_floors(regclass, timestamptz)")  # as it was before revision 0006
    op.execute("DROP INDEX sessions_seen, sessions_ended, streams_unsaid, streams_ended")
    op.execute("ALTER TABLE streams DROP COLUMN ended_at")
