"""Every statement of the hot path, named and described, for one schema.

`Queries("mcp_events").append` is bytes, ready for psycopg, with the schema's name quoted in. Names of parameters are
the same everywhere: `me` is this worker's number, `epoch` its fence, `session`, `server` and `owner` say who asks for
what, `bound` is the lower bound on `created_at` that keeps a read off the partitions that it does not need.

It is long, and stays in one piece: whoever changes the locks of one statement has to see those of the others.
"""

from __future__ import annotations

from typing import Final

from .schema import quote_schema

__all__ = ["Queries"]

_STATEMENTS: Final[dict[str, str]] = {}


def _statement(name: str, text: str) -> str:
    _STATEMENTS[name] = text
    return name


# --- start-up -------------------------------------------------------------------------------------------------------

_statement(
    "revisions",
    # What the database is, what it serves, and the key that channels and locks carry (both are database-wide).
    """
    SELECT (SELECT version_num FROM {s}.alembic_version), (SELECT oldest_worker FROM {s}.settings),
           to_regnamespace(%(schema)s)::oid::bigint, pg_is_in_recovery(), pg_backend_pid()
    """,
)
_LOCK = "pg_advisory_lock(%(oid)s::bigint::bit(32)::int, ({number} %% 2147483648)::int)"
_statement(
    "register_worker",
    # A new worker, on the connection that will be its life: nobody sees the row before the lock is held. Two int4 keys:
    # the schema's oid, so that two schemas in one database do not meet, and the number.
    """
    WITH registered AS (
        INSERT INTO {s}.workers (host, pid, revision) VALUES (%(host)s, %(pid)s, %(revision)s) RETURNING number
    )
    SELECT number, """
    + _LOCK.format(number="number")
    + " FROM registered",
)
_statement("drop_expired", "SELECT * FROM {s}.drop_expired(%(ttl)s)")
_statement("ensure_partitions", "SELECT {s}.ensure_partitions(%(ahead)s)")
_statement("lock_worker", "SELECT " + _LOCK.format(number="%(me)s::bigint"))
_statement("note_timeline", "SELECT {s}.note_timeline()")
_statement(
    "takes_writes",
    # Off on a standby, and where a limit on writes is set.
    "SELECT current_setting('transaction_read_only') = 'off'",
)
_statement("ping", "SELECT pg_notify(%(channel)s, %(payload)s)")

# --- sessions -------------------------------------------------------------------------------------------------------

_statement(
    "lock_count",
    # Makes count and insert one step. In a statement of its own, since a statement that waits here has a snapshot from
    # before and would count too few.
    "SELECT pg_advisory_xact_lock(hashtextextended('mcp_pg_events.max_sessions.' || %(server)s, 0))",
)
_statement(
    "count_sessions",
    # Live sessions of one server, counted no further than its limit.
    """
    SELECT count(*) FROM (
        SELECT FROM {s}.sessions WHERE server = %(server)s AND ended_at IS NULL
           AND (%(idle)s::float8 IS NULL OR seen_at > now() - make_interval(secs => %(idle)s::float8))
        LIMIT %(limit)s) live
    """,
)
_OWNER = """
    owner AS (SELECT epoch FROM {s}.workers WHERE number = %(me)s AND ended_at IS NULL FOR KEY SHARE)"""
# Whoever opens a stream locks its own row too: a worker that is being declared dead opens none that nobody would end,
# and the epoch that comes back tells whether somebody ended it since.
_statement(
    "open_session",
    # A session is restorable before its id is handed out: its row, its standalone stream and the stream of `initialize`
    # become visible together. Gives (standalone stream, initialize's stream, its creation, its owner's epoch); no row:
    # this worker was declared dead.
    "WITH "
    + _OWNER
    + """, session AS (
        INSERT INTO {s}.sessions (id, server, owner, initialize, protocol_version, worker)
        SELECT %(session)s, %(server)s, %(owner)s, %(initialize)s, %(protocol_version)s,
               CASE WHEN %(bound)s THEN %(me)s::bigint END
          FROM owner
    ), standalone AS (
        INSERT INTO {s}.streams (session_id) SELECT %(session)s FROM owner RETURNING number
    ), call AS (
        INSERT INTO {s}.streams (session_id, request_id, request_key, method, worker, reader_worker, reader_generation)
        SELECT %(session)s, %(request_id)s, %(request_key)s, 'initialize', %(me)s, %(me)s, 1 FROM owner
        RETURNING number, created_at
    )
    SELECT standalone.number, call.number, call.created_at, owner.epoch FROM standalone, call, owner
    """,
)
_statement(
    "renew_session",
    # A second `initialize` on a live session.
    """
    UPDATE {s}.sessions SET initialize = %(initialize)s, protocol_version = %(protocol_version)s, told = told + 1
     WHERE id = %(session)s AND ended_at IS NULL RETURNING told
    """,
)
_LIVE = """
    id = %(session)s AND server = %(server)s AND owner IS NOT DISTINCT FROM %(owner)s AND ended_at IS NULL
    AND (%(idle)s::float8 IS NULL OR seen_at > now() - make_interval(secs => %(idle)s::float8))
"""
_statement(
    "find_session",
    # One row where the session lives and is the asker's; foreign, ended and unknown give none alike.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + _LIVE
    + """), touched AS (
        UPDATE {s}.sessions SET seen_at = now()
         WHERE id = (SELECT id FROM session) AND seen_at < now() - make_interval(secs => %(touch)s::float8)
    )
    SELECT initialize, protocol_version, log_level, subscriptions,
           (SELECT number FROM {s}.streams WHERE session_id = session.id AND request_key IS NULL), told FROM session
    """,
)
_statement(
    "session_record",
    # The same for a worker that has the session already, and is told that it changed.
    """
    SELECT initialize, protocol_version, log_level, subscriptions,
           (SELECT number FROM {s}.streams WHERE session_id = s.id AND request_key IS NULL), told
      FROM {s}.sessions s WHERE id = %(session)s AND ended_at IS NULL
    """,
)
_statement(
    "open_stream",
    # A request arrives: is its session alive and the asker's, and its id free? Then its stream is open, its reader is
    # here. The key-share lock makes it wait for a DELETE of the session, or the DELETE for it. Of a stream that is in
    # the way the row tells whose it is: after a commit of unknown outcome it may be the asker's own. Without an epoch,
    # this worker was declared dead.
    "WITH "
    + _OWNER
    + """, session AS (SELECT * FROM {s}.sessions WHERE """
    + _LIVE
    + """ FOR KEY SHARE), touched AS (
        UPDATE {s}.sessions SET seen_at = now()
         WHERE id = (SELECT id FROM session) AND seen_at < now() - make_interval(secs => %(touch)s::float8)
    ), opened AS (
        INSERT INTO {s}.streams (session_id, request_id, request_key, method, worker, reader_worker, reader_generation)
        SELECT id, %(request_id)s, %(request_key)s, %(method)s, %(me)s, %(me)s, 1 FROM session, owner
        ON CONFLICT (session_id, request_key) WHERE final_seq IS NULL AND request_key IS NOT NULL DO NOTHING
        RETURNING number, created_at
    )
    SELECT owner.epoch, opened.number, opened.created_at, busy.number, busy.worker, busy.created_at,
           session.protocol_version, session.told,
           CASE WHEN %(restore)s THEN session.initialize END,
           CASE WHEN %(restore)s THEN session.log_level END,
           CASE WHEN %(restore)s THEN session.subscriptions END,
           CASE WHEN %(restore)s THEN
               (SELECT number FROM {s}.streams WHERE session_id = session.id AND request_key IS NULL) END
      FROM session LEFT JOIN owner ON true LEFT JOIN opened ON true
      LEFT JOIN {s}.streams busy ON opened.number IS NULL AND busy.session_id = session.id
           AND busy.request_key = %(request_key)s AND busy.final_seq IS NULL
    """,
)
_statement(
    "open_streams",
    # The same for many requests at once, where nothing stands against it; a request that gives no row is asked for as
    # above. All sessions are locked before the worker's row, which is the order in which a DELETE takes them, and one
    # that somebody holds is left out: the others would wait for it. The order of the inserts is that of all workers, so
    # that two who were sent the same requests do not deadlock.
    """
    WITH asked AS (
        SELECT * FROM unnest(%(sessions)b::text[], %(owners)b::text[], %(request_ids)b::text[],
                             %(request_keys)b::text[], %(methods)b::text[])
                      WITH ORDINALITY a(session, owner, request_id, request_key, method, place)
    ), session AS (
        SELECT s.id, s.protocol_version, s.told, a.request_id, a.request_key, a.method, a.place,
               s.seen_at < now() - make_interval(secs => %(touch)s::float8) AS stale
          FROM asked a JOIN {s}.sessions s ON s.id = a.session AND s.owner IS NOT DISTINCT FROM a.owner
         WHERE s.server = %(server)s AND s.ended_at IS NULL AND s.protocol_version IS NOT NULL
           AND (%(idle)s::float8 IS NULL OR s.seen_at > now() - make_interval(secs => %(idle)s::float8))
           FOR KEY SHARE OF s SKIP LOCKED
    ), owner AS (
        SELECT epoch FROM {s}.workers
         WHERE number = %(me)s AND ended_at IS NULL AND (SELECT count(*) FROM session) > 0 FOR KEY SHARE
    ), opened AS (
        INSERT INTO {s}.streams (session_id, request_id, request_key, method, worker, reader_worker, reader_generation)
        SELECT id, request_id, request_key, method, %(me)s, %(me)s, 1 FROM session, owner ORDER BY id, request_key
        ON CONFLICT (session_id, request_key) WHERE final_seq IS NULL AND request_key IS NOT NULL DO NOTHING
        RETURNING number, created_at, session_id, request_key
    )
    SELECT session.place, opened.number, opened.created_at, session.protocol_version, session.told, owner.epoch,
           session.stale
      FROM owner, opened JOIN session ON session.id = opened.session_id AND session.request_key = opened.request_key
    """,
)
_statement(
    "open_bound_stream",
    # The same for a session that lives on one worker: that one is to run the request, so its row is locked, and where
    # it is not the asker the request goes into its inbox in the same commit. The reader is here in any case. Letters
    # that wait for the asker are older than the request, and have to be delivered first.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + _LIVE
    + """ FOR KEY SHARE), touched AS (
        UPDATE {s}.sessions SET seen_at = now()
         WHERE id = (SELECT id FROM session) AND seen_at < now() - make_interval(secs => %(touch)s::float8)
    ), owner AS (
        SELECT number, epoch FROM {s}.workers
         WHERE number = (SELECT worker FROM session) AND ended_at IS NULL FOR KEY SHARE
    ), opened AS (
        INSERT INTO {s}.streams (session_id, request_id, request_key, method, worker, reader_worker, reader_generation)
        SELECT id, %(request_id)s, %(request_key)s, %(method)s, owner.number, %(me)s, 1 FROM session, owner
        ON CONFLICT (session_id, request_key) WHERE final_seq IS NULL AND request_key IS NOT NULL DO NOTHING
        RETURNING number, created_at
    ), letter AS (
        INSERT INTO {s}.inbox (worker, session_id, stream, payload)
        SELECT owner.number, %(session)s, opened.number, %(payload)s FROM owner, opened WHERE owner.number <> %(me)s
        RETURNING worker
    )
    SELECT owner.number, owner.epoch, opened.number, opened.created_at, session.protocol_version, session.told,
           busy.number, busy.created_at, busy.worker, busy.reader_worker, busy.reader_generation,
           owner.number = %(me)s AND EXISTS (
               SELECT FROM {s}.inbox WHERE worker = %(me)s AND session_id = %(session)s),
           (SELECT pg_notify(%(prefix)s::text || worker, 'i') FROM letter)
      FROM session JOIN owner ON true LEFT JOIN opened ON true
      LEFT JOIN {s}.streams busy ON opened.number IS NULL AND busy.session_id = session.id
           AND busy.request_key = %(request_key)s AND busy.final_seq IS NULL
    """,
)
_statement(
    "session_owner",
    # The worker that a session lives on, and whether letters of the session wait for the asker.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + _LIVE
    + """), touched AS (
        UPDATE {s}.sessions SET seen_at = now()
         WHERE id = (SELECT id FROM session) AND seen_at < now() - make_interval(secs => %(touch)s::float8)
    )
    SELECT w.number, w.number = %(me)s AND EXISTS (
               SELECT FROM {s}.inbox WHERE worker = %(me)s AND session_id = %(session)s)
      FROM session JOIN {s}.workers w ON w.number = session.worker AND w.ended_at IS NULL
    """,
)
_statement(
    "abandoned",
    "SELECT t.final_seq IS NOT NULL OR NOT {s}.holds_lock(t.worker) FROM {s}.streams t WHERE t.number = %(stream)s",
)
_statement(
    "set_log_level",
    "UPDATE {s}.sessions SET log_level = %(level)s, told = told + 1 WHERE id = %(session)s AND ended_at IS NULL "
    "RETURNING told",
)
_statement(
    "subscribe",
    """
    UPDATE {s}.sessions
       SET subscriptions = array_append(array_remove(subscriptions, %(uri)s::text), %(uri)s::text), told = told + 1
     WHERE id = %(session)s AND ended_at IS NULL AND cardinality(subscriptions) < %(limit)s RETURNING told
    """,
)
_statement(
    "unsubscribe",
    """
    UPDATE {s}.sessions SET subscriptions = array_remove(subscriptions, %(uri)s::text), told = told + 1
     WHERE id = %(session)s AND ended_at IS NULL RETURNING told
    """,
)
_statement(
    "touch_sessions",
    # Sessions with a running call or an attached reader on this worker. A dead worker's stop being stamped.
    "UPDATE {s}.sessions SET seen_at = now() WHERE id = ANY(%(sessions)b::text[]) AND ended_at IS NULL",
)
_statement(
    "gone_sessions",
    # Of sessions that a worker has in memory, those that have ended.
    """
    SELECT id FROM unnest(%(sessions)b::text[]) known(id)
     WHERE NOT EXISTS (SELECT FROM {s}.sessions s WHERE s.id = known.id AND s.ended_at IS NULL)
    """,
)
_statement(
    "idle_sessions",
    """
    SELECT id FROM {s}.sessions
     WHERE server = %(server)s AND ended_at IS NULL AND seen_at <= now() - make_interval(secs => %(idle)s::float8)
     ORDER BY seen_at LIMIT %(limit)s
    """,
)

# --- ending: DELETE, idle time-out, a dead worker's calls -------------------------------------------------------------

# In `sql/finish.sql`, with the locks that they take. Each is one statement: it holds the rows of the calls' owners, who
# store nothing meanwhile, and so may not wait for this worker's loop.
_statement(
    "end_session",
    "SELECT {s}.end_session(%(session)s, %(server)s, %(owner)s, %(idle)s::float8, false, %(reason)s, %(error)s)",
)
_statement(
    "end_idle_session",
    "SELECT {s}.end_session(%(session)s, NULL, NULL, %(idle)s::float8, true, %(reason)s, %(error)s)",
)
_statement(
    "end_worker",
    "SELECT * FROM {s}.end_worker(%(worker)s, %(reason)s, %(error)s, %(seen)s::timestamptz, %(locked)s::boolean)",
)
_statement("finish_calls", "SELECT {s}.finish_calls(%(streams)b::bigint[], %(error)s)")
_statement(
    "orphans",
    # Open calls of this worker that are not quite new; of those that it does not run, nobody would ever write the end.
    """
    SELECT number FROM {s}.streams
     WHERE worker = %(me)s AND final_seq IS NULL AND created_at < now() - interval '30 seconds'
    """,
)

# --- the log: append, wake, read --------------------------------------------------------------------------------------

_FENCE = """
    fence AS (
        SELECT number FROM {s}.workers
         WHERE number = %(me)s AND ended_at IS NULL AND epoch = %(epoch)s FOR KEY SHARE
    )"""
_statement(
    "append",
    # A batch of events whose numbers their worker gave, and the ends of the streams that end with it, in one commit.
    # No row back: somebody wrote into this worker's streams, or declared it dead.
    "WITH "
    + _FENCE
    + """, stored AS (
        INSERT INTO {s}.events (stream, seq, payload)
        SELECT e.stream, e.seq, e.payload
          FROM fence, unnest(%(streams)b::bigint[], %(seqs)b::bigint[], %(payloads)b::text[]) e(stream, seq, payload)
    ), ended AS (
        UPDATE {s}.streams t SET final_seq = f.seq, ended_at = now()
          FROM fence, unnest(%(final_streams)b::bigint[], %(final_seqs)b::bigint[]) f(stream, seq)
         WHERE t.number = f.stream AND t.final_seq IS NULL
    )
    SELECT now() FROM fence
    """,
)
_statement(
    "append_shared",
    # The same for streams that several workers write to: the number comes from the stream's row, locked in order, so
    # that commit order is number order. The mark lets a resume start at a recent partition. `origin` names the batch,
    # so that a writer whose commit's outcome is unknown can ask for it.
    "WITH "
    + _FENCE
    + """, entries AS (
        SELECT e.*, row_number() OVER (PARTITION BY e.stream ORDER BY e.place) AS nth
          FROM unnest(%(streams)b::bigint[], %(payloads)b::text[], %(finals)b::bigint[])
               WITH ORDINALITY e(stream, payload, final, place)
    ), locked AS (
        SELECT t.number FROM fence, {s}.streams t
         WHERE t.number = ANY(%(streams)b::bigint[]) AND t.final_seq IS NULL ORDER BY t.number FOR UPDATE OF t
    ), numbered AS (
        UPDATE {s}.streams t
           SET last_seq = greatest(t.last_seq, t.floor) + n.count,
               final_seq = CASE WHEN n.final THEN greatest(t.last_seq, t.floor) + n.count END,
               ended_at = CASE WHEN n.final THEN now() END,
               mark_seq = CASE WHEN t.mark_at < now() - interval '1 hour'
                               THEN greatest(t.last_seq, t.floor) ELSE t.mark_seq END,
               mark_at = CASE WHEN t.mark_at < now() - interval '1 hour' THEN now() ELSE t.mark_at END
          FROM (SELECT stream, count(*) AS count, bool_or(final = 1) AS final FROM entries GROUP BY stream) n, locked
         WHERE t.number = n.stream AND locked.number = t.number
        RETURNING t.number, t.last_seq - n.count AS base
    ), stored AS (
        INSERT INTO {s}.events (stream, seq, payload, origin)
        SELECT e.stream, numbered.base + e.nth, e.payload, %(origin)s
          FROM entries e JOIN numbered ON numbered.number = e.stream
    )
    SELECT e.place, numbered.base + e.nth, now()
      FROM fence JOIN entries e ON true LEFT JOIN numbered ON numbered.number = e.stream
    """,
)
_statement("lock_self", "SELECT epoch FROM {s}.workers WHERE number = %(me)s AND ended_at IS NULL FOR UPDATE")
_statement("own_epoch", "SELECT epoch FROM {s}.workers WHERE number = %(me)s AND ended_at IS NULL")
_statement(
    "was_appended",
    # With the payload: the number alone may be that of an error which somebody else ended the stream with.
    """
    SELECT EXISTS (SELECT FROM {s}.events WHERE stream = %(stream)s AND seq = %(seq)s AND created_at >= %(bound)s
                      AND payload = %(payload)s)
    """,
)
_statement(
    "was_appended_shared",
    """
    SELECT stream, seq, created_at FROM {s}.events
     WHERE stream = ANY(%(streams)b::bigint[]) AND created_at >= %(bound)s AND origin = %(origin)s ORDER BY stream, seq
    """,
)
_statement(
    "behind",
    # Streams of which the log holds less than this worker was acknowledged. Their next number, a final's, lies above
    # all that a client may have been given.
    """
    UPDATE {s}.streams t SET last_seq = greatest(t.last_seq, w.stored)
      FROM unnest(%(streams)b::bigint[], %(stored)b::bigint[]) w(stream, stored)
     WHERE t.number = w.stream AND t.final_seq IS NULL AND w.stored > greatest(t.floor, coalesce(
           (SELECT max(seq) FROM {s}.events WHERE stream = w.stream AND created_at >= %(bound)s), 0))
    RETURNING t.number
    """,
)
_statement(
    "finished_streams",
    "SELECT number FROM {s}.streams WHERE number = ANY(%(streams)b::bigint[]) AND final_seq IS NOT NULL",
)
_statement(
    "wake",
    # After the commit, in a statement of its own: who reads elsewhere? Nobody, in the common case, and then nothing is
    # sent. 300 keys stay below the 8000 bytes of a notification. Reader's worker -1 never is.
    # A transaction that notifies has a commit record, with nothing in it to lose: its flush is not waited for.
    """
    WITH remote AS (
        SELECT reader_worker, number,
               row_number() OVER (PARTITION BY reader_worker ORDER BY number) / 300 AS part
          FROM {s}.streams
         WHERE number = ANY(%(streams)b::bigint[]) AND reader_worker IS NOT NULL AND reader_worker <> %(me)s
    )
    SELECT count(pg_notify(%(prefix)s::text || reader_worker, keys)), set_config('synchronous_commit', 'off', true)
      FROM (SELECT reader_worker, 's' || string_agg(number::text, ',') AS keys
              FROM remote GROUP BY reader_worker, part) n
    """,
)
_statement(
    "read",
    # What follows in each of several streams, up to `limit` events and `page` bytes of each, with what a reader must
    # know of the stream itself. One scalar bound for all, the least of theirs: never prepared, so that it prunes when
    # planning.
    """
    SELECT w.stream, t.final_seq, t.reader_generation, t.floor, e.seq, e.created_at, e.payload, now()
      FROM unnest(%(streams)b::bigint[], %(after)b::bigint[]) w(stream, after)
      JOIN {s}.streams t ON t.number = w.stream
      LEFT JOIN LATERAL (
          SELECT seq, created_at, payload,
                 sum(octet_length(payload)) OVER (ORDER BY seq) - octet_length(payload) AS before
            FROM (SELECT seq, created_at, payload FROM {s}.events
                   WHERE stream = w.stream AND seq > w.after AND created_at >= %(bound)s
                   ORDER BY seq LIMIT %(limit)s) page
      ) e ON e.before < %(page)s
     ORDER BY w.stream, e.seq
    """,
)

# --- readers ----------------------------------------------------------------------------------------------------------

_statement(
    "find_stream",
    # A stream by its number, or the standalone one where none is given, inside a live session of the asker's. A session
    # that ended with the worker it lived on tells its clients so for a minute: they may come back for their calls.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + _LIVE.replace(
        "ended_at IS NULL",
        "(ended_at IS NULL OR worker IS NOT NULL AND %(stream)s::bigint IS NOT NULL "
        "AND ended_reason NOT IN ('deleted', 'idle', 'failed') AND ended_at > now() - interval '1 minute')",
    )
    + """), touched AS (
        UPDATE {s}.sessions SET seen_at = now()
         WHERE id = (SELECT id FROM session) AND seen_at < now() - make_interval(secs => %(touch)s::float8)
    )
    SELECT session.protocol_version, t.number, t.request_key IS NULL, t.floor, t.cursor, t.final_seq,
           -- The mark holds for what follows it; the cursor's own event has to be found too, unless it is the priming
           -- one.
           CASE WHEN t.mark_seq < %(after)s OR t.mark_seq = 0 THEN greatest(t.created_at, t.mark_at)
                ELSE t.created_at END
      FROM session LEFT JOIN {s}.streams t ON t.session_id = session.id
           AND (t.number = %(stream)s::bigint OR %(stream)s::bigint IS NULL AND t.request_key IS NULL)
    """,
)
_statement(
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
_statement(
    "detach",
    # The reader went. What was handed to it is remembered for a client that comes back to the standalone stream with no
    # id.
    """
    UPDATE {s}.streams SET reader_worker = NULL, cursor = greatest(cursor, %(position)s)
     WHERE number = %(stream)s AND reader_generation = %(generation)s
    """,
)

_statement(
    "close_reader",
    """
    SELECT pg_notify(%(prefix)s::text || reader_worker, 'c' || number) FROM {s}.streams
     WHERE number = %(stream)s AND reader_worker IS NOT NULL
    """,
)

# --- streams by name: the SDK's EventStore for one session ------------------------------------------------------------

_statement(
    "adopt_session",
    """
    INSERT INTO {s}.sessions (id, server) VALUES (%(session)s, %(server)s) ON CONFLICT (id) DO NOTHING
    """,
)
_statement(
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

# --- to the owner of a call -------------------------------------------------------------------------------------------

_statement(
    "call_owner",
    # Who runs the request that a cancellation names.
    """
    SELECT worker FROM {s}.streams
     WHERE session_id = %(session)s AND request_key = %(request_key)s AND final_seq IS NULL
    """,
)
_statement(
    "session_workers",
    """
    SELECT DISTINCT worker FROM {s}.streams
     WHERE session_id = %(session)s AND final_seq IS NULL AND worker IS NOT NULL
    """,
)
_statement(
    "post",
    # A message on its way to the worker that it concerns; durable, then announced, before the client's 202. The lock
    # keeps it from being left behind by one that is just being declared dead.
    """
    WITH alive AS (
        SELECT number FROM {s}.workers WHERE number = ANY(%(workers)b::bigint[]) AND ended_at IS NULL FOR KEY SHARE
    ), letter AS (
        INSERT INTO {s}.inbox (worker, session_id, payload) SELECT number, %(session)s, %(payload)s FROM alive
        RETURNING worker
    )
    SELECT worker, pg_notify(%(prefix)s::text || worker, 'i') FROM letter
    """,
)
_statement(
    "letters",
    # Read first, and removed once they are delivered: the answer to one statement that did both could be lost. A
    # request comes with its stream, which may have ended on the way, and the epoch under which it was open.
    """
    SELECT l.id, l.session_id, l.payload, l.stream, t.created_at, t.request_key,
           (SELECT epoch FROM {s}.workers WHERE number = %(me)s)
      FROM (SELECT *, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS before
              FROM (SELECT * FROM {s}.inbox WHERE worker = %(me)s ORDER BY id LIMIT %(limit)s) page) l
      LEFT JOIN {s}.streams t ON t.number = l.stream AND t.final_seq IS NULL
     WHERE before < %(page)s ORDER BY l.id
    """,
)
_statement("remove_letters", "DELETE FROM {s}.inbox WHERE worker = %(me)s AND id = ANY(%(ids)b::bigint[])")
_statement(
    "tell_others",
    "SELECT pg_notify(%(prefix)s::text || number, %(payload)s) FROM {s}.workers "
    "WHERE ended_at IS NULL AND number <> %(me)s",
)

# --- life and death of workers ----------------------------------------------------------------------------------------

_statement("stamp", "UPDATE {s}.workers SET seen_at = now() WHERE number = %(me)s AND ended_at IS NULL RETURNING epoch")
_statement(
    "suspects",
    # Other workers that may be dead: without their lock, or without a stamp for very long. `watch.py` judges.
    """
    SELECT number, seen_at, locked FROM (
        SELECT w.number, w.seen_at, {s}.holds_lock(w.number) AS locked
          FROM {s}.workers w WHERE w.ended_at IS NULL AND w.number <> %(me)s) other
     WHERE NOT locked OR seen_at < now() - make_interval(secs => %(unresponsive)s::float8)
     ORDER BY number
    """,
)


class Queries:
    """The statements above for one schema, as bytes. An unknown name raises AttributeError."""

    def __init__(self, schema: str) -> None:
        quoted = quote_schema(schema).replace("%", "%%")
        for name, text in _STATEMENTS.items():
            setattr(self, name, f"/* mcp_pg_events:{name} */{text.format(s=quoted)}".encode())

    def __getattr__(self, name: str) -> bytes:
        # Only reached for a name that `__init__` did not set.
        raise AttributeError(f"no statement is called {name!r}")
