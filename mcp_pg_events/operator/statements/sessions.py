"""Pages of sessions, one of them, its end, and the erasure of its payloads."""

from __future__ import annotations

from typing import Final, LiteralString

__all__ = [
    "CALLS_OF_SESSION",
    "CLOSE_STANDALONE",
    "CONDITIONS",
    "END_SESSION",
    "ERASE_EVENTS",
    "ERASE_INBOX",
    "ERASE_SESSION",
    "LOCK_SESSION",
    "OPEN_CALLS_OF_SESSION",
    "RAISE_FLOORS",
    "SESSION",
    "SESSIONS",
    "SIZE_OF_SESSION",
    "STREAMS_OF_SESSION",
    "STREAM_COUNTS",
]

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
# An array and no join, for which a whole partition would be read.
SIZE_OF_SESSION: Final[LiteralString] = """
    SELECT count(*) AS events, coalesce(sum(octet_length(payload)), 0)::bigint AS bytes
      FROM {s}.events
     WHERE stream = ANY(ARRAY(SELECT number FROM {s}.streams WHERE session_id = %(session)s))
       AND created_at >= %(bound)s
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
    UPDATE {s}.streams t SET floor = greatest(t.floor, t.last_seq, t.final_seq), upstream_id = NULL FROM ended
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
    UPDATE {s}.sessions SET initialize = NULL, log_level = NULL, subscriptions = '{{}}', upstream = NULL
     WHERE id = %(session)s
"""
