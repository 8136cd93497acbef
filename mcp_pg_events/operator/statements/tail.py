"""Following one session."""

from __future__ import annotations

from typing import Final, LiteralString

__all__ = [
    "TAIL_EVENTS",
    "TAIL_SESSION",
    "TAIL_STREAMS",
]

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
