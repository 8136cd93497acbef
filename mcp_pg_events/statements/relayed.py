"""Streams of an upstream: what a proxy relays. Next: the end of sessions and workers, in `endings.py`."""

from __future__ import annotations

from .parts import LIVE, Statements

statement = Statements()

statement(
    "relayed_session",
    # What a replica has to know of a session to send its requests on.
    """
    WITH session AS (SELECT * FROM {s}.sessions WHERE """
    + LIVE
    + """), touched AS (
        UPDATE {s}.sessions SET seen_at = now()
         WHERE id = (SELECT id FROM session) AND seen_at < now() - make_interval(secs => %(touch)s::float8)
    )
    SELECT upstream, protocol_version, (SELECT number FROM {s}.streams WHERE session_id = session.id
                                           AND request_key IS NULL)
      FROM session WHERE upstream IS NOT NULL
    """,
)
statement(
    "resumable",
    # The first id that the upstream gave in each of some streams: from then on another replica can go on with them.
    """
    UPDATE {s}.streams t SET upstream_id = f.upstream_id
      FROM unnest(%(streams)b::bigint[], %(upstream_ids)b::text[]) f(stream, upstream_id)
     WHERE t.number = f.stream AND t.worker = %(me)s AND t.upstream_id IS NULL
    """,
)
statement(
    "release",
    # This worker reads them no more, and has nothing of them left to store.
    """
    UPDATE {s}.streams SET worker = NULL, adrift_since = now()
     WHERE number = ANY(%(streams)b::bigint[]) AND worker = %(me)s AND final_seq IS NULL
    """,
)
statement(
    "claim",
    # Become the worker of a stream that has none; the locks in the order of a DELETE, which then finds its new worker.
    # A standalone stream that nobody has read yet is taken in the same way.
    """
    WITH session AS (SELECT id FROM {s}.sessions WHERE """
    + LIVE
    + """ FOR KEY SHARE), owner AS (
        SELECT epoch FROM {s}.workers
         WHERE number = %(me)s AND ended_at IS NULL AND (SELECT count(*) FROM session) > 0 FOR KEY SHARE
    ), claimed AS (
        UPDATE {s}.streams t SET worker = %(me)s, adrift_since = NULL FROM session, owner
         WHERE t.number = %(stream)s AND t.session_id = session.id AND t.final_seq IS NULL
           AND (t.worker IS NULL OR t.worker = %(me)s AND %(lost)s)
        RETURNING t.created_at, t.request_id, t.request_key, t.upstream_id, greatest(t.floor, t.last_seq) AS base
    )
    SELECT owner.epoch, claimed.* FROM owner, claimed
    """,
)
statement(
    "last_relayed",
    # Where its last worker stopped; never prepared, since it reads events.
    """
    SELECT seq, upstream_id FROM {s}.events WHERE stream = %(stream)s AND created_at >= %(bound)s
     ORDER BY seq DESC LIMIT 1
    """,
)
statement(
    "adrift",
    "SELECT number FROM {s}.streams WHERE number = ANY(%(streams)b::bigint[]) AND worker IS NULL AND final_seq IS NULL",
)
statement(
    "unread",
    "SELECT number FROM {s}.streams WHERE number = ANY(%(streams)b::bigint[]) AND reader_worker IS NULL",
)
statement(
    "overdue",
    # Calls that no replica has gone on with for so long that nobody will.
    """
    SELECT t.number, t.session_id FROM {s}.streams t JOIN {s}.sessions s ON s.id = t.session_id
     WHERE t.adrift_since < now() - make_interval(secs => %(timeout)s::float8) AND t.final_seq IS NULL
       AND t.request_key IS NOT NULL AND s.server = %(server)s AND s.ended_at IS NULL
     ORDER BY t.adrift_since LIMIT %(limit)s
    """,
)
