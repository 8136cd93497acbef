"""Sessions, streams, partitioned events, inbox, workers.

Revision ID: 0001
Revises:
Create Date: 2026-11-22
"""

from alembic import op

from mcp_pg_events.migrate import read_sql, verbatim

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE settings (
    singleton boolean PRIMARY KEY DEFAULT true CHECK (singleton),
    partition_interval text NOT NULL CHECK (partition_interval IN ('hour', 'day', 'week', 'month')),
    oldest_worker text NOT NULL,
    timeline text
);
COMMENT ON TABLE settings IS 'One row: what holds for the whole schema.';
COMMENT ON COLUMN settings.partition_interval IS 'Length of a partition of events; UTC bounds.';
COMMENT ON COLUMN settings.timeline IS 'Of the server''s write-ahead log; another one means a failover.';
COMMENT ON COLUMN settings.oldest_worker IS 'Workers of an older revision than this refuse to start.';

CREATE TABLE workers (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    host text NOT NULL,
    pid integer NOT NULL,
    revision text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    epoch bigint NOT NULL DEFAULT 0,
    ended_at timestamptz,
    ended_reason text
);
COMMENT ON TABLE workers IS
    'One row per worker process; every append locks its own row, so that a dead worker cannot append.';
COMMENT ON COLUMN workers.number IS 'Never reused.';
COMMENT ON COLUMN workers.revision IS 'The newest schema revision that the worker knows.';
COMMENT ON COLUMN workers.epoch IS 'Rises when another worker writes finals into its streams; an append names it.';
COMMENT ON COLUMN workers.seen_at IS
    'Stamped now and then; a worker is dead when its lock is free and this is stale.';

CREATE TABLE sessions (
    id text PRIMARY KEY,
    server text NOT NULL,
    owner text,
    initialize text,
    protocol_version text,
    log_level text,
    subscriptions text[] NOT NULL DEFAULT '{}',
    told bigint NOT NULL DEFAULT 0,
    created_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    ended_reason text
);
CREATE INDEX sessions_live ON sessions (server, seen_at) WHERE ended_at IS NULL;
COMMENT ON TABLE sessions IS 'One row per MCP session.';
COMMENT ON COLUMN sessions.id IS 'Mcp-Session-Id.';
COMMENT ON COLUMN sessions.server IS 'Name of the server that the session belongs to.';
COMMENT ON COLUMN sessions.owner IS 'Who may use the session, as the server''s authentication names them.';
COMMENT ON COLUMN sessions.initialize IS 'The params of initialize as JSON, to restore the session elsewhere.';
COMMENT ON COLUMN sessions.log_level IS 'The last logging/setLevel.';
COMMENT ON COLUMN sessions.subscriptions IS 'URIs of the live resources/subscribe.';
COMMENT ON COLUMN sessions.told IS 'How often its client has changed what the session remembers of it.';

CREATE TABLE streams (
    number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    session_id text NOT NULL,
    request_id text,
    request_key text,
    method text,
    worker bigint,
    reader_worker bigint,
    reader_generation bigint NOT NULL DEFAULT 0,
    cursor bigint NOT NULL DEFAULT 0,
    last_seq bigint NOT NULL DEFAULT 0,
    mark_seq bigint NOT NULL DEFAULT 0,
    mark_at timestamptz NOT NULL DEFAULT now(),
    floor bigint NOT NULL DEFAULT 0,
    final_seq bigint,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE UNIQUE INDEX streams_in_flight ON streams (session_id, request_key)
    WHERE final_seq IS NULL AND request_key IS NOT NULL;
CREATE UNIQUE INDEX streams_standalone ON streams (session_id) WHERE request_key IS NULL;
CREATE INDEX streams_session ON streams (session_id);
CREATE INDEX streams_open ON streams (worker) WHERE final_seq IS NULL;
COMMENT ON TABLE streams IS 'One row per stream: a request''s answer, or a session''s standalone stream.';
COMMENT ON COLUMN streams.number IS 'First part of an event id.';
COMMENT ON COLUMN streams.request_id IS 'The request''s id, verbatim JSON; null for the standalone stream.';
COMMENT ON COLUMN streams.method IS 'The request''s method where it is known, for people.';
COMMENT ON COLUMN streams.request_key IS 'The same id as the SDK coerces it, for lookups.';
COMMENT ON COLUMN streams.worker IS
    'The worker that runs the request and appends its events; null where several workers append.';
COMMENT ON COLUMN streams.reader_worker IS
    'The worker of the newest reader; null if that left before the end of the stream.';
COMMENT ON COLUMN streams.reader_generation IS 'Rises with every attach: the newest reader wins.';
COMMENT ON COLUMN streams.cursor IS
    'The highest seq that was handed to a reader which left: where one that names no event goes on.';
COMMENT ON COLUMN streams.last_seq IS
    'The highest seq of a stream that several workers append to; 0 where one worker counts by itself.';
COMMENT ON COLUMN streams.mark_seq IS 'Every event after this seq was created at mark_at or later.';
COMMENT ON COLUMN streams.mark_at IS
    'Lower bound on created_at for reads from mark_seq on: spares the older partitions.';
COMMENT ON COLUMN streams.floor IS 'The highest seq that left with a dropped partition.';
COMMENT ON COLUMN streams.final_seq IS 'The seq of the final response; null while the stream is open.';

CREATE TABLE events (
    stream bigint NOT NULL,
    seq bigint NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    origin text,
    payload text NOT NULL,
    PRIMARY KEY (stream, seq, created_at)
) PARTITION BY RANGE (created_at);
COMMENT ON TABLE events IS
    'Append-only: rows are inserted, and leave with their partition. No default partition, no foreign keys.';
COMMENT ON COLUMN events.seq IS 'Contiguous in its stream, from 1.';
COMMENT ON COLUMN events.origin IS
    'In a stream that several workers append to: the batch it came in, to find it after a commit of unknown outcome.';
COMMENT ON COLUMN events.payload IS 'The JSON-RPC message; text, because jsonb refuses U+0000.';

CREATE TABLE inbox (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker bigint NOT NULL,
    session_id text NOT NULL,
    payload text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX inbox_worker ON inbox (worker, id);
COMMENT ON TABLE inbox IS 'Messages from clients on their way to the worker that runs the call.';
COMMENT ON COLUMN inbox.worker IS 'The worker that the message is for.';
"""


def upgrade() -> None:
    op.execute(verbatim(TABLES))
    interval = op.get_context().opts["partition_interval"]  # one of four known words
    op.execute(f"INSERT INTO settings (partition_interval, oldest_worker) VALUES ('{interval}', '{revision}')")
    op.execute(verbatim(read_sql("ensure_partitions.sql")))
    op.execute(verbatim(read_sql("note_timeline.sql")))
    op.execute("SELECT ensure_partitions()")


def downgrade() -> None:
    op.execute("DROP FUNCTION ensure_partitions(integer)")
    op.execute("DROP FUNCTION note_timeline()")
    op.execute("DROP TABLE inbox, events, streams, sessions, workers, settings")
