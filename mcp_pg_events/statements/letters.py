"""Messages to the owner of a call. Next: its worker, whose life and death are in `workers.py`."""

from __future__ import annotations

from .parts import Statements

statement = Statements()

statement(
    "call_owner",
    # Who runs the request that a cancellation names.
    """
    SELECT worker FROM {s}.streams
     WHERE session_id = %(session)s AND request_key = %(request_key)s AND final_seq IS NULL
    """,
)
statement(
    "session_workers",
    """
    SELECT DISTINCT worker FROM {s}.streams
     WHERE session_id = %(session)s AND final_seq IS NULL AND worker IS NOT NULL
    """,
)
statement(
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
statement(
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
statement("remove_letters", "DELETE FROM {s}.inbox WHERE worker = %(me)s AND id = ANY(%(ids)b::bigint[])")
statement(
    "tell_others",
    "SELECT pg_notify(%(prefix)s::text || number, %(payload)s) FROM {s}.workers "
    "WHERE ended_at IS NULL AND number <> %(me)s",
)
