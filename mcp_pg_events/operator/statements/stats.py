"""Counting what there is: exactly where that is cheap, and by what PostgreSQL knows of a table otherwise."""

from __future__ import annotations

from typing import Final, LiteralString

__all__ = ["CALLS", "LIVE_INDEX", "LIVE_SESSIONS", "PARTITIONS", "PARTITION_COUNT", "READERS", "TABLES", "WORKERS"]

# What a table has by the planner's rule: rows per page when it was last vacuumed or analysed, times its pages now; or,
# where it never was, what has been inserted since the statistics began.
_ESTIMATE: Final[LiteralString] = """
    greatest(CASE WHEN c.relpages > 0 AND c.reltuples >= 0
                  THEN c.reltuples / c.relpages * (pg_relation_size(c.oid) / current_setting('block_size')::int)
                  ELSE coalesce(pg_stat_get_live_tuples(c.oid), 0) END, 0)::bigint
"""
PARTITIONS: Final[LiteralString] = (
    """
    SELECT c.relname AS name, bounds[1]::timestamptz AS lower, bounds[2]::timestamptz AS upper,
           i.inhdetachpending AS going, now() AS now, pg_total_relation_size(c.oid) AS bytes,
           pg_table_size(c.oid) AS heap, """
    + _ESTIMATE
    + """ AS events
      FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
      CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid),
          '^FOR VALUES FROM \\(''([^'']+)''\\) TO \\(''([^'']+)''\\)$') AS bounds
     WHERE i.inhparent = %(events)s::regclass AND bounds IS NOT NULL
     ORDER BY 2
"""
)
# By the table as a whole, since a worker's role may not read its partitions; the bounds leave one of them.
PARTITION_COUNT: Final[LiteralString] = """
    SELECT count(*) AS events FROM {s}.events WHERE created_at >= %(lower)s AND created_at < %(upper)s
"""
TABLES: Final[LiteralString] = (
    """
    SELECT c.relname AS name, pg_total_relation_size(c.oid) AS bytes, pg_table_size(c.oid) AS heap,
           """
    + _ESTIMATE
    + """ AS rows
      FROM pg_class c
     WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = %(events)s::regclass)
       AND c.relname IN ('sessions', 'streams', 'inbox') AND c.relkind = 'r'
     ORDER BY bytes DESC
"""
)
# An index of the live ones alone knows how many there are.
LIVE_INDEX: Final[LiteralString] = """
    SELECT greatest(c.reltuples, 0)::bigint AS live, pg_relation_size(c.oid) AS bytes
      FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
     WHERE i.indrelid = %(sessions)s::regclass AND c.relname = 'sessions_seen'
"""
LIVE_SESSIONS: Final[LiteralString] = "SELECT count(*) AS live FROM {s}.sessions WHERE ended_at IS NULL"
CALLS: Final[LiteralString] = """
    SELECT t.method, count(*) AS calls, count(*) FILTER (WHERE t.reader_worker IS NOT NULL) AS read,
           extract(epoch FROM max(now() - t.created_at))::float8 AS oldest
      FROM {s}.streams t WHERE t.final_seq IS NULL AND t.request_key IS NOT NULL
     GROUP BY 1 ORDER BY 2 DESC, 1
"""
READERS: Final[LiteralString] = """
    SELECT count(*) AS readers, count(*) FILTER (WHERE t.request_key IS NULL) AS standalone
      FROM {s}.streams t WHERE t.final_seq IS NULL AND t.reader_worker IS NOT NULL
"""
WORKERS: Final[LiteralString] = """
    WITH open AS (
        SELECT worker, count(*) AS calls FROM {s}.streams
         WHERE final_seq IS NULL AND request_key IS NOT NULL AND worker IS NOT NULL GROUP BY 1
    ), attached AS (
        SELECT reader_worker AS worker, count(*) AS readers FROM {s}.streams
         WHERE final_seq IS NULL AND reader_worker IS NOT NULL GROUP BY 1
    )
    SELECT w.number, w.host, w.pid, w.revision, w.started_at, extract(epoch FROM now() - w.seen_at)::float8 AS silent,
           {s}.holds_lock(w.number) AS alive, coalesce(open.calls, 0) AS calls,
           coalesce(attached.readers, 0) AS readers
      FROM {s}.workers w LEFT JOIN open ON open.worker = w.number LEFT JOIN attached ON attached.worker = w.number
     WHERE w.ended_at IS NULL ORDER BY w.number
"""
