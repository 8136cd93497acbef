"""Carrying a session elsewhere."""

from __future__ import annotations

from typing import Final, LiteralString

__all__ = [
    "CARRIED",
    "CARRIED_CHECKS",
    "CARRIED_COPY",
    "CARRIED_COUNTS",
    "CARRIED_EXPIRE",
    "CARRIED_HOURS",
    "CARRIED_INSERT",
    "CARRIED_LOST",
    "CARRIED_TAKEN",
    "EXPORT_COUNTS",
    "EXPORT_EVENTS",
    "EXPORT_SESSION",
    "EXPORT_STREAMS",
    "LOCK_PARTITIONS",
    "LOCK_RETENTION",
    "MAKE_PARTITION",
    "PARTITIONS",
]

EXPORT_SESSION: Final[LiteralString] = """
    SELECT id, server, owner, initialize, protocol_version, log_level, subscriptions, worker, told, upstream,
           created_at, seen_at, ended_at, ended_reason
      FROM {s}.sessions WHERE id = %(session)s
"""
EXPORT_STREAMS: Final[LiteralString] = """
    SELECT number, request_id, request_key, method, worker IS NULL AND adrift_since IS NULL AS shared, upstream_id,
           reader_generation, cursor, last_seq, mark_seq, mark_at, floor, final_seq, created_at, ended_at
      FROM {s}.streams WHERE session_id = %(session)s ORDER BY number
"""
EXPORT_EVENTS: Final[LiteralString] = """
    SELECT stream, seq, created_at, origin, upstream_id, payload FROM {s}.events
     WHERE stream = ANY(ARRAY(SELECT number FROM {s}.streams WHERE session_id = %(session)s)) ORDER BY stream, seq
"""
EXPORT_COUNTS: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM {s}.streams WHERE session_id = %(session)s) AS streams,
           (SELECT count(*) FROM {s}.events
             WHERE stream = ANY(ARRAY(SELECT number FROM {s}.streams WHERE session_id = %(session)s))) AS events
"""
# Where the lines of a file wait until they are complete, and found to be in order.
CARRIED: Final[LiteralString] = """
    CREATE TEMPORARY TABLE carried_streams (
        number bigint PRIMARY KEY, request_id text, request_key text, method text, shared boolean NOT NULL,
        upstream_id text, reader_generation bigint NOT NULL, cursor bigint NOT NULL, last_seq bigint NOT NULL,
        mark_seq bigint NOT NULL, mark_at timestamptz NOT NULL, floor bigint NOT NULL, final_seq bigint,
        created_at timestamptz NOT NULL,
        ended_at timestamptz
    ) ON COMMIT DROP;
    CREATE TEMPORARY TABLE carried_events (
        stream bigint NOT NULL, seq bigint NOT NULL, created_at timestamptz NOT NULL, origin text,
        upstream_id text, payload text NOT NULL, PRIMARY KEY (stream, seq)
    ) ON COMMIT DROP
"""
CARRIED_COPY: Final[dict[str, LiteralString]] = {
    "stream": "COPY pg_temp.carried_streams FROM STDIN",
    "event": "COPY pg_temp.carried_events FROM STDIN",
}
# What no export has; each has a row where the file is not in order.
CARRIED_CHECKS: Final[dict[str, LiteralString]] = {
    "an event of a stream that it does not have": """
        SELECT FROM pg_temp.carried_events e
         WHERE NOT EXISTS (SELECT FROM pg_temp.carried_streams t WHERE t.number = e.stream) LIMIT 1
    """,
    "an event after the end of its stream, or before its beginning": """
        SELECT FROM pg_temp.carried_events e JOIN pg_temp.carried_streams t ON t.number = e.stream
         WHERE e.seq < 1 OR e.seq > t.final_seq LIMIT 1
    """,
    "a stream without a number, or with half an id": """
        SELECT FROM pg_temp.carried_streams
         WHERE number < 1 OR (request_id IS NULL) <> (request_key IS NULL) LIMIT 1
    """,
    "two standalone streams": """
        SELECT FROM pg_temp.carried_streams WHERE request_key IS NULL HAVING count(*) > 1
    """,
    "two running calls of one id": """
        SELECT FROM pg_temp.carried_streams WHERE final_seq IS NULL AND request_key IS NOT NULL
         GROUP BY request_key HAVING count(*) > 1 LIMIT 1
    """,
}
CARRIED_TAKEN: Final[LiteralString] = """
    SELECT EXISTS (SELECT FROM {s}.sessions WHERE id = %(session)s)
           OR EXISTS (SELECT FROM {s}.streams WHERE session_id = %(session)s) AS session,
           (SELECT min(t.number) FROM {s}.streams t JOIN pg_temp.carried_streams USING (number)) AS stream,
           (SELECT c.number FROM pg_temp.carried_streams c
             WHERE EXISTS (SELECT FROM {s}.events e WHERE e.stream = c.number) LIMIT 1) AS events,
           (SELECT max(number) FROM pg_temp.carried_streams) AS top
"""
LOCK_RETENTION: Final[LiteralString] = """
    SELECT pg_try_advisory_xact_lock(
        hashtextextended('mcp_pg_events.retention', %(events)s::regclass::oid::bigint)) AS alone
"""
LOCK_PARTITIONS: Final[LiteralString] = """
    SELECT pg_advisory_xact_lock(hashtextextended('mcp_pg_events.ensure_partitions', relnamespace::bigint))
      FROM pg_class WHERE oid = %(events)s::regclass
"""
PARTITIONS: Final[LiteralString] = """
    SELECT c.relname AS name, bounds[1]::timestamptz AS lower, bounds[2]::timestamptz AS upper,
           i.inhdetachpending AS going
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
      CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid),
          '^FOR VALUES FROM \\(''([^'']+)''\\) TO \\(''([^'']+)''\\)$') AS bounds
     WHERE i.inhparent = %(events)s::regclass AND bounds IS NOT NULL
     ORDER BY 2
"""
# What is older than the retention's horizon, or would fall into a partition that is on its way out, counts as expired,
# with whatever comes before it in its stream.
CARRIED_EXPIRE: Final[LiteralString] = """
    WITH gone AS (
        SELECT stream, max(seq) AS seq FROM pg_temp.carried_events
         WHERE created_at < now() - %(ttl)s::interval OR EXISTS (
             SELECT FROM unnest(%(lowers)s::timestamptz[], %(uppers)s::timestamptz[]) going(lower, upper)
              WHERE created_at >= lower AND created_at < upper)
         GROUP BY stream
    ), raised AS (
        UPDATE pg_temp.carried_streams t SET floor = greatest(t.floor, gone.seq) FROM gone WHERE t.number = gone.stream
    ), deleted AS (
        DELETE FROM pg_temp.carried_events e USING gone WHERE e.stream = gone.stream AND e.seq <= gone.seq RETURNING 1
    )
    SELECT count(*) AS events FROM deleted
"""
CARRIED_HOURS: Final[LiteralString] = """
    SELECT DISTINCT date_trunc('hour', created_at, 'UTC') AS hour FROM pg_temp.carried_events ORDER BY 1 LIMIT %(limit)s
"""
# As in ensure_partitions.sql: standalone, and attached then, since a partition that is made as one locks every reader
# out.
MAKE_PARTITION: Final[LiteralString] = """
    CREATE TABLE {name} (LIKE {s}.events INCLUDING ALL, CONSTRAINT bounds CHECK
        (created_at IS NOT NULL AND created_at >= {lower} AND created_at < {upper}));
    ALTER TABLE {s}.events ATTACH PARTITION {name} FOR VALUES FROM ({lower}) TO ({upper});
    ALTER TABLE {name} DROP CONSTRAINT bounds
"""
# The numbers of workers are another database's. A session that was live was in use just now, for its idle time-out. Of
# a proxy's session, streams with which another replica can go on are adrift, as when their worker died.
CARRIED_INSERT: Final[LiteralString] = """
    WITH session AS (
        INSERT INTO {s}.sessions (id, server, owner, initialize, protocol_version, log_level, subscriptions, told,
                                  upstream, created_at, seen_at, ended_at, ended_reason)
        VALUES (%(id)s, %(server)s, %(owner)s, %(initialize)s, %(protocol_version)s, %(log_level)s, %(subscriptions)s,
                %(told)s, %(upstream)s, %(created_at)s,
                CASE WHEN %(ended_at)s::timestamptz IS NULL THEN now() ELSE %(seen_at)s END,
                %(ended_at)s, %(ended_reason)s)
    ), stream AS (
        INSERT INTO {s}.streams (number, session_id, request_id, request_key, method, reader_generation, cursor,
                                 last_seq, mark_seq, mark_at, floor, final_seq, created_at, ended_at,
                                 upstream_id, adrift_since)
        OVERRIDING SYSTEM VALUE
        SELECT t.number, %(id)s, t.request_id, t.request_key, t.method, t.reader_generation, t.cursor,
               greatest(t.last_seq, last.seq), t.mark_seq, t.mark_at, t.floor, t.final_seq, t.created_at, t.ended_at,
               t.upstream_id, CASE WHEN %(adrift)s AND t.final_seq IS NULL
                   AND (t.upstream_id IS NOT NULL OR t.request_key IS NULL) THEN now() END
          FROM pg_temp.carried_streams t
          LEFT JOIN (SELECT stream, max(seq) AS seq FROM pg_temp.carried_events GROUP BY stream) last
            ON last.stream = t.number AND t.shared
         ORDER BY t.number
    )
    INSERT INTO {s}.events (stream, seq, created_at, origin, upstream_id, payload)
    SELECT stream, seq, created_at, origin, upstream_id, payload FROM pg_temp.carried_events
"""
CARRIED_LOST: Final[LiteralString] = """
    SELECT {s}.finish_calls(array(SELECT number FROM pg_temp.carried_streams
         WHERE final_seq IS NULL AND request_key IS NOT NULL AND (NOT shared OR %(all)s)
           AND NOT (%(adrift)s AND upstream_id IS NOT NULL)), %(error)s) AS stream
"""
CARRIED_COUNTS: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM {s}.streams t JOIN pg_temp.carried_streams c USING (number)
             WHERE t.session_id = %(session)s) AS streams,
           (SELECT count(*) FROM {s}.events e JOIN pg_temp.carried_events c ON c.stream = e.stream AND c.seq = e.seq
               AND c.created_at = e.created_at AND c.payload = e.payload) AS events,
           (SELECT count(*) FROM pg_temp.carried_streams) AS carried_streams,
           (SELECT count(*) FROM pg_temp.carried_events) AS carried_events
"""
