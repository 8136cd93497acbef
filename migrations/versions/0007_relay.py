"""Sessions and streams of an upstream, for the proxy.

Revision ID: 0007
Revises: 0006
Create Date: 2026-11-26
"""

from alembic import op

from mcp_pg_events.migrate import read_sql, verbatim

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

CHANGES = """
ALTER TABLE sessions ADD COLUMN upstream text;
COMMENT ON COLUMN sessions.upstream IS 'The upstream''s id of a proxied session; empty where it gave none.';

ALTER TABLE streams ADD COLUMN upstream_id text;
COMMENT ON COLUMN streams.upstream_id IS
    'The first id that an upstream gave in it: another replica can go on with it.';
ALTER TABLE streams ADD COLUMN adrift_since timestamptz;
COMMENT ON COLUMN streams.adrift_since IS 'When the worker that read it from an upstream was gone.';
CREATE INDEX streams_adrift ON streams (adrift_since) WHERE adrift_since IS NOT NULL AND final_seq IS NULL;

ALTER TABLE events ADD COLUMN upstream_id text;
COMMENT ON COLUMN events.upstream_id IS 'What an upstream calls the event, where a proxy stored it.';
"""


def upgrade() -> None:
    op.execute(verbatim(CHANGES))
    op.execute(verbatim(read_sql("relay.sql")))


def downgrade() -> None:
    op.execute(verbatim(read_sql("finish.sql")))
    op.execute("ALTER TABLE events DROP COLUMN upstream_id")
    op.execute("DROP INDEX streams_adrift")
    op.execute("ALTER TABLE streams DROP COLUMN adrift_since, DROP COLUMN upstream_id")
    op.execute("ALTER TABLE sessions DROP COLUMN upstream")
