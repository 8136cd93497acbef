"""Sessions, and the streams of their requests. Next: `log.py` for what goes into those."""

from __future__ import annotations

from .parts import LIVE, OWNER, TOUCHED, Statements

statement = Statements()

_COUNT = "(hashtextextended('mcp_pg_events.max_sessions.' || %(server)s, 0))"
statement(
    "lock_count",
    # Makes count and insert one step. In a statement of its own, since a statement that waits here has a snapshot from
    # before and would count too few.
    f"SELECT pg_advisory_xact_lock{_COUNT}",
)
statement(
    "share_count",
    # For a session that `admission.py` lets in without a count: no count while it is being opened.
    f"SELECT pg_advisory_xact_lock_shared{_COUNT}",
)
statement(
    "count_sessions",
    # Live sessions of one server, counted no further than its limit.
    """
    SELECT count(*) FROM (
        SELECT FROM {s}.sessions WHERE server = %(server)s AND ended_at IS NULL
           AND (%(idle)s::float8 IS NULL OR seen_at > now() - make_interval(secs => %(idle)s::float8))
        LIMIT %(limit)s) live
    """,
)
statement(
    "open_session",
    # A session is restorable before its id is handed out: its row, its standalone stream and the stream of `initialize`
    # become visible together. Gives (standalone stream, initialize's stream, its creation, its owner's epoch); no row:
    # this worker was declared dead.
    "WITH "
    + OWNER
    + """, session AS (
        INSERT INTO {s}.sessions (id, server, owner, initialize, protocol_version, worker, upstream)
        SELECT %(session)s, %(server)s, %(owner)s, %(initialize)s, %(protocol_version)s,
               CASE WHEN %(bound)s THEN %(me)s::bigint END, %(upstream)s
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
statement(
    "renew_session",
    # A second `initialize` on a live session.
    """
    UPDATE {s}.sessions SET initialize = %(initialize)s, protocol_version = %(protocol_version)s, told = told + 1
     WHERE id = %(session)s AND ended_at IS NULL RETURNING told
    """,
)
statement(
    "find_session",
    # One row where the session lives and is the asker's; foreign, ended and unknown give none alike.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + LIVE
    + """), """
    + TOUCHED
    + """
    SELECT initialize, protocol_version, log_level, subscriptions,
           (SELECT number FROM {s}.streams WHERE session_id = session.id AND request_key IS NULL), told FROM session
    """,
)
statement(
    "session_record",
    # The same for a worker that has the session already, and is told that it changed.
    """
    SELECT initialize, protocol_version, log_level, subscriptions,
           (SELECT number FROM {s}.streams WHERE session_id = s.id AND request_key IS NULL), told
      FROM {s}.sessions s WHERE id = %(session)s AND ended_at IS NULL
    """,
)
statement(
    "open_stream",
    # A request arrives: is its session alive and the asker's, and its id free? Then its stream is open, its reader is
    # here. The key-share lock makes it wait for a DELETE of the session, or the DELETE for it. Of a stream that is in
    # the way the row tells whose it is: after a commit of unknown outcome it may be the asker's own. Without an epoch,
    # this worker was declared dead.
    "WITH "
    + OWNER
    + """, session AS (SELECT * FROM {s}.sessions WHERE """
    + LIVE
    + """ FOR KEY SHARE), """
    + TOUCHED
    + """, opened AS (
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
statement(
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
           AND s.seen_at > now() - make_interval(secs => %(idle)s::float8)
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
    SELECT session.place, opened.number, opened.created_at, session.protocol_version, session.told::bigint, owner.epoch,
           session.stale
      FROM owner, opened JOIN session ON session.id = opened.session_id AND session.request_key = opened.request_key
    """,
)
statement(
    "open_bound_stream",
    # The same for a session that lives on one worker: that one is to run the request, so its row is locked, and where
    # it is not the asker the request goes into its inbox in the same commit. The reader is here in any case. Letters
    # that wait for the asker are older than the request, and have to be delivered first.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + LIVE
    + """ FOR KEY SHARE), """
    + TOUCHED
    + """, owner AS (
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
statement(
    "session_owner",
    # The worker that a session lives on, and whether letters of the session wait for the asker.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + LIVE
    + """), """
    + TOUCHED
    + """
    SELECT w.number, w.number = %(me)s AND EXISTS (
               SELECT FROM {s}.inbox WHERE worker = %(me)s AND session_id = %(session)s)
      FROM session JOIN {s}.workers w ON w.number = session.worker AND w.ended_at IS NULL
    """,
)
statement(
    "abandoned",
    "SELECT t.final_seq IS NOT NULL OR NOT {s}.holds_lock(t.worker) FROM {s}.streams t WHERE t.number = %(stream)s",
)
statement(
    "set_log_level",
    "UPDATE {s}.sessions SET log_level = %(level)s, told = told + 1 WHERE id = %(session)s AND ended_at IS NULL "
    "RETURNING told",
)
statement(
    "subscribe",
    """
    UPDATE {s}.sessions
       SET subscriptions = array_append(array_remove(subscriptions, %(uri)s::text), %(uri)s::text), told = told + 1
     WHERE id = %(session)s AND ended_at IS NULL AND cardinality(subscriptions) < %(limit)s RETURNING told
    """,
)
statement(
    "unsubscribe",
    """
    UPDATE {s}.sessions SET subscriptions = array_remove(subscriptions, %(uri)s::text), told = told + 1
     WHERE id = %(session)s AND ended_at IS NULL RETURNING told
    """,
)
statement(
    "touch_sessions",
    # Sessions with a running call or an attached reader on this worker. A dead worker's stop being stamped.
    "UPDATE {s}.sessions SET seen_at = now() WHERE id = ANY(%(sessions)b::text[]) AND ended_at IS NULL",
)
statement(
    "gone_sessions",
    # Of sessions that a worker has in memory, those that have ended.
    """
    SELECT id FROM unnest(%(sessions)b::text[]) known(id)
     WHERE NOT EXISTS (SELECT FROM {s}.sessions s WHERE s.id = known.id AND s.ended_at IS NULL)
    """,
)
statement(
    "idle_sessions",
    """
    SELECT id FROM {s}.sessions
     WHERE server = %(server)s AND ended_at IS NULL AND seen_at <= now() - make_interval(secs => %(idle)s::float8)
     ORDER BY seen_at LIMIT %(limit)s
    """,
)
