"""Readers of streams, and streams by name. Next: `letters.py` for what clients send back."""

from __future__ import annotations

from .parts import LIVE, TOUCHED, Statements

statement = Statements()

statement(
    "find_stream",
    # A stream by its number, or the standalone one where none is given, inside a live session of the asker's. A session
    # that ended with the worker it lived on tells its clients so for a minute: they may come back for their calls.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + LIVE.replace(
        "ended_at IS NULL",
        "(ended_at IS NULL OR worker IS NOT NULL AND %(stream)s::bigint IS NOT NULL "
        "AND ended_reason NOT IN ('deleted', 'idle', 'failed') AND ended_at > now() - interval '1 minute')",
    )
    + """), """
    + TOUCHED
    + """
    SELECT session.protocol_version, t.number, t.request_key IS NULL, t.floor, t.cursor, t.final_seq,
           -- The mark holds for what follows it; the cursor's own event has to be found too, unless it is the priming
           -- one.
           CASE WHEN t.mark_seq < %(after)s OR t.mark_seq = 0 THEN greatest(t.created_at, t.mark_at)
                ELSE t.created_at END
      FROM session LEFT JOIN {s}.streams t ON t.session_id = session.id
           AND (t.number = %(stream)s::bigint OR %(stream)s::bigint IS NULL AND t.request_key IS NULL)
    """,
)
statement(
    "attach",
    # The newest reader wins, if its cursor is one that was given out and nothing after it is missing; the older one, if
    # it sits elsewhere, is told. The event of the cursor itself may be gone: the next one then vouches for it, or the
    # floor, or the end of the stream. If it is refused, the last column tells whether what it names has left with a
    # partition; what a failover lost has something after it.
    """
    WITH given AS (
        SELECT created_at FROM {s}.events
         WHERE stream = %(stream)s AND seq = %(after)s AND created_at >= %(bound)s
    ), following AS (
        SELECT seq FROM {s}.events
         WHERE stream = %(stream)s AND seq > %(after)s AND created_at >= %(bound)s ORDER BY seq LIMIT 1
    ), previous AS (
        SELECT reader_worker, floor, final_seq FROM {s}.streams WHERE number = %(stream)s FOR UPDATE
    ), attached AS (
        UPDATE {s}.streams t SET reader_worker = %(me)s, reader_generation = reader_generation + 1
          FROM previous
         WHERE t.number = %(stream)s
           AND (NOT %(given)s OR %(after)s IN (previous.floor, previous.final_seq) OR EXISTS (SELECT FROM given)
                OR %(after)s + 1 = (SELECT seq FROM following))
        RETURNING t.reader_generation, t.final_seq
    )
    SELECT attached.reader_generation, attached.final_seq, previous.floor, (SELECT max(created_at) FROM given),
           CASE WHEN previous.reader_worker <> %(me)s AND attached.reader_generation IS NOT NULL
                THEN pg_notify(%(prefix)s::text || previous.reader_worker,
                               'k' || %(stream)s || ':' || attached.reader_generation) END,
           %(after)s < previous.floor
               OR (coalesce(%(after)s < previous.final_seq, false) AND NOT EXISTS (SELECT FROM following))
      FROM previous LEFT JOIN attached ON true
    """,
)
statement(
    "detach",
    # The reader went. What was handed to it is remembered for a client that comes back to the standalone stream with no
    # id.
    """
    UPDATE {s}.streams SET reader_worker = NULL, cursor = greatest(cursor, %(position)s)
     WHERE number = %(stream)s AND reader_generation = %(generation)s
    """,
)

statement(
    "close_reader",
    """
    SELECT pg_notify(%(prefix)s::text || reader_worker, 'c' || number) FROM {s}.streams
     WHERE number = %(stream)s AND reader_worker IS NOT NULL
    """,
)

# --- streams by name: the SDK's EventStore for one session ------------------------------------------------------------

statement(
    "adopt_session",
    """
    INSERT INTO {s}.sessions (id, server) VALUES (%(session)s, %(server)s) ON CONFLICT (id) DO NOTHING
    """,
)
statement(
    "named_stream",
    # The open stream of a name, made at its first event. Two workers may meet here: the index lets one of them win.
    """
    WITH made AS (
        INSERT INTO {s}.streams (session_id, request_id, request_key)
        VALUES (%(session)s, %(request_id)s, %(request_key)s)
        ON CONFLICT (session_id, request_key) WHERE final_seq IS NULL AND request_key IS NOT NULL DO NOTHING
        RETURNING number, last_seq, created_at
    )
    SELECT number, last_seq, created_at FROM made UNION ALL
    SELECT number, last_seq, created_at FROM {s}.streams
     WHERE session_id = %(session)s AND request_key = %(request_key)s AND final_seq IS NULL
    """,
)
