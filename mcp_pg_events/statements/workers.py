"""Start-up, life and death of workers. Next: `endings.py` for the calls of one that is gone."""

from __future__ import annotations

from .parts import Statements

statement = Statements()

statement(
    "revisions",
    # What the database is, what it serves, and the key that channels and locks carry (both are database-wide).
    """
    SELECT (SELECT version_num FROM {s}.alembic_version), (SELECT oldest_worker FROM {s}.settings),
           to_regnamespace(%(schema)s)::oid::bigint, pg_is_in_recovery(), pg_backend_pid()
    """,
)
_LOCK = "pg_advisory_lock(%(oid)s::bigint::bit(32)::int, ({number} %% 2147483648)::int)"
statement(
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
statement("drop_expired", "SELECT * FROM {s}.drop_expired(%(ttl)s)")
statement("ensure_partitions", "SELECT {s}.ensure_partitions(%(ahead)s)")
statement("lock_worker", "SELECT " + _LOCK.format(number="%(me)s::bigint"))
statement("note_timeline", "SELECT {s}.note_timeline()")
statement(
    "takes_writes",
    # Off on a standby, and where a limit on writes is set.
    "SELECT current_setting('transaction_read_only') = 'off'",
)
statement("ping", "SELECT pg_notify(%(channel)s, %(payload)s)")

# --- life and death of workers ----------------------------------------------------------------------------------------

statement("stamp", "UPDATE {s}.workers SET seen_at = now() WHERE number = %(me)s AND ended_at IS NULL RETURNING epoch")
statement(
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
