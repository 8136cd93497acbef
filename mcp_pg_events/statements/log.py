"""The log: append, wake, read. Next: `readers.py` for who gets it."""

from __future__ import annotations

from .parts import Statements

statement = Statements()

_FENCE = """
    fence AS (
        SELECT number FROM {s}.workers
         WHERE number = %(me)s AND ended_at IS NULL AND epoch = %(epoch)s FOR KEY SHARE
    )"""
_ENDS = """
    ), ended AS (
        UPDATE {s}.streams t SET final_seq = f.seq, ended_at = now()
          FROM fence, unnest(%(final_streams)b::bigint[], %(final_seqs)b::bigint[]) f(stream, seq)
         WHERE t.number = f.stream AND t.final_seq IS NULL
    )
    SELECT now() FROM fence
    """
statement(
    "append",
    # A batch of events whose numbers their worker gave, and the ends of the streams that end with it, in one commit.
    # No row back: somebody wrote into this worker's streams, or declared it dead.
    "WITH "
    + _FENCE
    + """, stored AS (
        INSERT INTO {s}.events (stream, seq, payload)
        SELECT e.stream, e.seq, e.payload
          FROM fence, unnest(%(streams)b::bigint[], %(seqs)b::bigint[], %(payloads)b::text[]) e(stream, seq, payload)"""
    + _ENDS,
)
statement(
    "append_relayed",
    # As `append`, with the ids that the upstream gave its events.
    "WITH "
    + _FENCE
    + """, stored AS (
        INSERT INTO {s}.events (stream, seq, payload, upstream_id)
        SELECT e.stream, e.seq, e.payload, e.upstream_id
          FROM fence, unnest(%(streams)b::bigint[], %(seqs)b::bigint[], %(payloads)b::text[], %(upstream_ids)b::text[])
                      e(stream, seq, payload, upstream_id)"""
    + _ENDS,
)
statement(
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
statement("lock_self", "SELECT epoch FROM {s}.workers WHERE number = %(me)s AND ended_at IS NULL FOR UPDATE")
statement("own_epoch", "SELECT epoch FROM {s}.workers WHERE number = %(me)s AND ended_at IS NULL")
statement(
    "was_appended",
    # With the payload: the number alone may be that of an error which somebody else ended the stream with.
    """
    SELECT EXISTS (SELECT FROM {s}.events WHERE stream = %(stream)s AND seq = %(seq)s AND created_at >= %(bound)s
                      AND payload = %(payload)s)
    """,
)
statement(
    "was_appended_shared",
    """
    SELECT stream, seq, created_at FROM {s}.events
     WHERE stream = ANY(%(streams)b::bigint[]) AND created_at >= %(bound)s AND origin = %(origin)s ORDER BY stream, seq
    """,
)
statement(
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
statement(
    "finished_streams",
    "SELECT number FROM {s}.streams WHERE number = ANY(%(streams)b::bigint[]) AND final_seq IS NOT NULL",
)
statement(
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
statement(
    "read",
    # What follows in each of several streams, up to `limit` events and `page` bytes of each, with what a reader must
    # know of the stream itself. One scalar bound for all, the least of theirs: a kept plan has it as a constant, so
    # that it prunes when planning.
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
