"""Every statement of the operator's commands, for one schema: `{s}` stands for its name.

Percent signs are doubled, and values are given by name, as everywhere in psycopg. None of these is prepared, so that
each is planned with its values, and reads no partition that its bound on `created_at` leaves out.
"""

from __future__ import annotations

from typing import Final, LiteralString

__all__ = [
    "CALLS_OF_SESSION",
    "CARRIED",
    "CARRIED_CHECKS",
    "CARRIED_COPY",
    "CARRIED_COUNTS",
    "CARRIED_EXPIRE",
    "CARRIED_HOURS",
    "CARRIED_INSERT",
    "CARRIED_LOST",
    "CARRIED_TAKEN",
    "CLOSE_STANDALONE",
    "CONDITIONS",
    "END_SESSION",
    "ERASE_EVENTS",
    "ERASE_INBOX",
    "ERASE_SESSION",
    "EXPORT_COUNTS",
    "EXPORT_EVENTS",
    "EXPORT_SESSION",
    "EXPORT_STREAMS",
    "LOCK_PARTITIONS",
    "LOCK_RETENTION",
    "LOCK_SESSION",
    "MAKE_PARTITION",
    "OPEN_CALLS_OF_SESSION",
    "PARTITIONS",
    "RAISE_FLOORS",
    "REVISIONS",
    "SESSION",
    "SESSIONS",
    "SIZE_OF_SESSION",
    "STREAMS_OF_SESSION",
    "STREAM_COUNTS",
    "TAIL_EVENTS",
    "TAIL_SESSION",
    "TAIL_STREAMS",
]

REVISIONS: Final[LiteralString] = """
    SELECT (SELECT version_num FROM {s}.alembic_version) AS revision,
           (SELECT oldest_worker FROM {s}.settings) AS oldest_worker
"""

# --- sessions ---------------------------------------------------------------------------------------------------------

# The page is cut first, by an index; what is counted is counted for its rows alone.
SESSIONS: Final[LiteralString] = """
    SELECT s.id, s.server, s.owner, s.worker, s.protocol_version, s.created_at, s.seen_at, s.ended_at, s.ended_reason,
           now() - s.seen_at AS idle,
           (SELECT count(*) FROM {s}.streams t
             WHERE t.session_id = s.id AND t.final_seq IS NULL AND t.request_key IS NOT NULL) AS calls,
           (SELECT count(*) FROM {s}.streams t WHERE t.session_id = s.id AND t.final_seq IS NULL
               AND t.request_key IS NOT NULL AND t.reader_worker IS NOT NULL)
           + (SELECT count(*) FROM {s}.streams t WHERE t.session_id = s.id AND t.final_seq IS NULL
                 AND t.request_key IS NULL AND t.reader_worker IS NOT NULL) AS readers
      FROM (SELECT * FROM {s}.sessions s WHERE {where}
             ORDER BY s.created_at DESC, s.id DESC LIMIT %(limit)s) s
     ORDER BY s.created_at DESC, s.id DESC
"""
_RUNNING: Final[LiteralString] = """
    EXISTS (SELECT FROM {s}.streams t
             WHERE t.session_id = s.id AND t.final_seq IS NULL AND t.request_key IS NOT NULL"""
CONDITIONS: Final[dict[str, LiteralString]] = {
    "live": "s.ended_at IS NULL",
    "ended": "s.ended_at IS NOT NULL",
    "server": "s.server = %(server)s",
    "owner": "s.owner = %(owner)s",
    "since": "s.created_at >= %(since)s",
    "since_ago": "s.created_at >= now() - %(since)s",
    "until": "s.created_at < %(until)s",
    "until_ago": "s.created_at < now() - %(until)s",
    "idle": "s.ended_at IS NULL AND s.seen_at <= now() - %(idle)s",
    "running": _RUNNING + ")",
    "method": _RUNNING + " AND t.method = %(method)s)",
    "after": "(s.created_at, s.id) < (%(after_created)s, %(after_id)s)",
}

SESSION: Final[LiteralString] = """
    SELECT s.*, now() - s.seen_at AS idle, cardinality(s.subscriptions) AS subscribed
      FROM {s}.sessions s WHERE s.id = %(session)s
"""
STREAM_COUNTS: Final[LiteralString] = """
    SELECT count(*) AS streams, count(*) FILTER (WHERE final_seq IS NULL AND request_key IS NOT NULL) AS calls,
           count(*) FILTER (WHERE final_seq IS NULL AND reader_worker IS NOT NULL) AS readers,
           min(created_at) AS oldest
      FROM {s}.streams WHERE session_id = %(session)s
"""
_STREAM: Final[LiteralString] = """
    SELECT t.number, t.request_id, t.method, t.request_key IS NULL AS standalone, t.worker, t.reader_worker,
           t.reader_generation, t.cursor, t.floor, t.final_seq, t.created_at, t.ended_at,
           coalesce(t.final_seq, greatest(t.last_seq, t.floor, (SELECT max(e.seq) FROM {s}.events e
               WHERE e.stream = t.number AND e.created_at >= %(bound)s)), 0) AS last_seq,
           w.host AS worker_host, w.pid AS worker_pid, w.ended_at IS NULL AND {s}.holds_lock(w.number) AS worker_alive,
           r.host AS reader_host, r.pid AS reader_pid
      FROM {s}.streams t LEFT JOIN {s}.workers w ON w.number = t.worker
      LEFT JOIN {s}.workers r ON r.number = t.reader_worker
"""
STREAMS_OF_SESSION: Final[LiteralString] = (
    _STREAM + " WHERE t.session_id = %(session)s ORDER BY t.number DESC LIMIT %(limit)s"
)
CALLS_OF_SESSION: Final[LiteralString] = (
    _STREAM
    + " WHERE t.session_id = %(session)s AND t.final_seq IS NULL AND t.request_key IS NOT NULL"
    + " ORDER BY t.number LIMIT %(limit)s"
)
SIZE_OF_SESSION: Final[LiteralString] = """
    SELECT count(*) AS events, coalesce(sum(octet_length(e.payload)), 0)::bigint AS bytes, max(e.created_at) AS newest
      FROM {s}.streams t JOIN {s}.events e ON e.stream = t.number AND e.created_at >= %(bound)s
     WHERE t.session_id = %(session)s
"""

# --- ending and purging -----------------------------------------------------------------------------------------------

# As a DELETE of its client's would, whoever that is.
END_SESSION: Final[LiteralString] = """
    WITH ended AS MATERIALIZED (
        SELECT {s}.end_session(s.id, s.server, s.owner, NULL, false, %(reason)s, %(error)s) AS streams
          FROM {s}.sessions s WHERE s.id = %(session)s
    )
    SELECT ended.streams, (SELECT count(*) FROM {s}.streams t
             WHERE t.number = ANY(ended.streams) AND t.request_key IS NOT NULL) AS calls FROM ended
"""
LOCK_SESSION: Final[LiteralString] = """
    SELECT ended_at FROM {s}.sessions WHERE id = %(session)s FOR UPDATE
"""
OPEN_CALLS_OF_SESSION: Final[LiteralString] = """
    SELECT {s}.finish_calls(array(SELECT t.number FROM {s}.streams t
        WHERE t.session_id = %(session)s AND t.final_seq IS NULL AND t.request_key IS NOT NULL), %(error)s) AS stream
"""
CLOSE_STANDALONE: Final[LiteralString] = """
    UPDATE {s}.streams SET final_seq = greatest(last_seq, floor), ended_at = now()
     WHERE session_id = %(session)s AND request_key IS NULL AND final_seq IS NULL RETURNING number AS stream
"""
# Before the events go, in the same commit: whoever asks for them is told that they have expired, and no number is given
# twice. Of streams that ended alone, in which nothing follows.
RAISE_FLOORS: Final[LiteralString] = """
    WITH ended AS (
        SELECT number FROM {s}.streams WHERE session_id = %(session)s AND final_seq IS NOT NULL
         ORDER BY number FOR UPDATE
    )
    UPDATE {s}.streams t SET floor = greatest(t.floor, t.last_seq, t.final_seq) FROM ended
     WHERE t.number = ended.number RETURNING t.number AS stream
"""
# Without a bound on the time, so that nothing is left that was stored while a clock was wrong.
ERASE_EVENTS: Final[LiteralString] = """
    WITH erased AS (
        DELETE FROM {s}.events WHERE stream = ANY(%(streams)s::bigint[])
        RETURNING octet_length(payload) AS bytes
    )
    SELECT count(*) AS events, coalesce(sum(bytes), 0)::bigint AS bytes FROM erased
"""
ERASE_INBOX: Final[LiteralString] = "DELETE FROM {s}.inbox WHERE session_id = %(session)s"
ERASE_SESSION: Final[LiteralString] = """
    UPDATE {s}.sessions SET initialize = NULL, log_level = NULL, subscriptions = '{{}}' WHERE id = %(session)s
"""

# --- following --------------------------------------------------------------------------------------------------------

TAIL_SESSION: Final[LiteralString] = """
    SELECT ended_at, ended_reason, now() AS now FROM {s}.sessions WHERE id = %(session)s
"""
# All at first; then those in which something may follow. A number is given before its stream can be seen, so that those
# of the last minutes are looked at again.
TAIL_STREAMS: Final[LiteralString] = """
    SELECT number, request_id, method, request_key IS NULL AS standalone, created_at, final_seq
      FROM {s}.streams
     WHERE session_id = %(session)s AND (%(since)s::timestamptz IS NULL OR ended_at IS NULL OR ended_at >= %(since)s)
       AND (%(looked)s::timestamptz IS NULL OR final_seq IS NULL OR created_at >= %(looked)s - interval '10 minutes'
            OR number = ANY(%(unread)s::bigint[]))
     ORDER BY created_at, number
"""
# What follows in each of several streams, up to so many events and bytes of each; `more` where that cut something off.
TAIL_EVENTS: Final[LiteralString] = """
    SELECT w.stream, e.seq, e.created_at, left(e.payload, %(characters)s) AS payload, e.length,
           e.found >= %(limit)s OR e.after_it > 0 AS more, t.request_key IS NOT NULL AND t.final_seq = e.seq AS final
      FROM unnest(%(streams)s::bigint[], %(after)s::bigint[]) w(stream, after)
      JOIN {s}.streams t ON t.number = w.stream
      CROSS JOIN LATERAL (
          SELECT *, octet_length(payload) AS length, count(*) OVER () AS found,
                 sum(octet_length(payload)) OVER (ORDER BY seq) - octet_length(payload) AS before,
                 count(*) OVER (ORDER BY seq DESC) - 1 AS after_it
            FROM (SELECT seq, created_at, payload FROM {s}.events
                   WHERE stream = w.stream AND seq > w.after AND created_at >= %(bound)s
                   ORDER BY seq LIMIT %(limit)s) page
      ) e
     WHERE e.before < %(bytes)s
     ORDER BY w.stream, e.seq
"""

# --- carrying a session elsewhere -------------------------------------------------------------------------------------

EXPORT_SESSION: Final[LiteralString] = """
    SELECT id, server, owner, initialize, protocol_version, log_level, subscriptions, worker, told, created_at, seen_at,
           ended_at, ended_reason
      FROM {s}.sessions WHERE id = %(session)s
"""
EXPORT_STREAMS: Final[LiteralString] = """
    SELECT number, request_id, request_key, method, worker IS NULL AS shared, reader_generation, cursor, last_seq,
           mark_seq, mark_at, floor, final_seq, created_at, ended_at
      FROM {s}.streams WHERE session_id = %(session)s ORDER BY number
"""
EXPORT_EVENTS: Final[LiteralString] = """
    SELECT e.stream, e.seq, e.created_at, e.origin, e.payload
      FROM {s}.streams t JOIN {s}.events e ON e.stream = t.number
     WHERE t.session_id = %(session)s ORDER BY e.stream, e.seq
"""
EXPORT_COUNTS: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM {s}.streams WHERE session_id = %(session)s) AS streams,
           (SELECT count(*) FROM {s}.streams t JOIN {s}.events e ON e.stream = t.number
             WHERE t.session_id = %(session)s) AS events
"""
# Where the lines of a file wait until they are complete, and found to be in order.
CARRIED: Final[LiteralString] = """
    CREATE TEMPORARY TABLE carried_streams (
        number bigint PRIMARY KEY, request_id text, request_key text, method text, shared boolean NOT NULL,
        reader_generation bigint NOT NULL, cursor bigint NOT NULL, last_seq bigint NOT NULL, mark_seq bigint NOT NULL,
        mark_at timestamptz NOT NULL, floor bigint NOT NULL, final_seq bigint, created_at timestamptz NOT NULL,
        ended_at timestamptz
    ) ON COMMIT DROP;
    CREATE TEMPORARY TABLE carried_events (
        stream bigint NOT NULL, seq bigint NOT NULL, created_at timestamptz NOT NULL, origin text,
        payload text NOT NULL, PRIMARY KEY (stream, seq)
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
# The numbers of workers are another database's. A session that was live was in use just now, for its idle time-out.
CARRIED_INSERT: Final[LiteralString] = """
    WITH session AS (
        INSERT INTO {s}.sessions (id, server, owner, initialize, protocol_version, log_level, subscriptions, told,
                                  created_at, seen_at, ended_at, ended_reason)
        VALUES (%(id)s, %(server)s, %(owner)s, %(initialize)s, %(protocol_version)s, %(log_level)s, %(subscriptions)s,
                %(told)s, %(created_at)s, CASE WHEN %(ended_at)s::timestamptz IS NULL THEN now() ELSE %(seen_at)s END,
                %(ended_at)s, %(ended_reason)s)
    ), stream AS (
        INSERT INTO {s}.streams (number, session_id, request_id, request_key, method, reader_generation, cursor,
                                 last_seq, mark_seq, mark_at, floor, final_seq, created_at, ended_at)
        OVERRIDING SYSTEM VALUE
        SELECT t.number, %(id)s, t.request_id, t.request_key, t.method, t.reader_generation, t.cursor,
               greatest(t.last_seq, last.seq), t.mark_seq, t.mark_at, t.floor, t.final_seq, t.created_at, t.ended_at
          FROM pg_temp.carried_streams t
          LEFT JOIN (SELECT stream, max(seq) AS seq FROM pg_temp.carried_events GROUP BY stream) last
            ON last.stream = t.number AND t.shared
         ORDER BY t.number
    )
    INSERT INTO {s}.events (stream, seq, created_at, origin, payload)
    SELECT stream, seq, created_at, origin, payload FROM pg_temp.carried_events
"""
CARRIED_LOST: Final[LiteralString] = """
    SELECT {s}.finish_calls(array(SELECT number FROM pg_temp.carried_streams
        WHERE final_seq IS NULL AND request_key IS NOT NULL AND (NOT shared OR %(all)s)), %(error)s) AS stream
"""
CARRIED_COUNTS: Final[LiteralString] = """
    SELECT (SELECT count(*) FROM {s}.streams t JOIN pg_temp.carried_streams c USING (number)
             WHERE t.session_id = %(session)s) AS streams,
           (SELECT count(*) FROM {s}.events e JOIN pg_temp.carried_events c ON c.stream = e.stream AND c.seq = e.seq
               AND c.created_at = e.created_at AND c.payload = e.payload) AS events,
           (SELECT count(*) FROM pg_temp.carried_streams) AS carried_streams,
           (SELECT count(*) FROM pg_temp.carried_events) AS carried_events
"""
