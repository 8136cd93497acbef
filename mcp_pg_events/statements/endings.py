"""The ends of calls: DELETE, idle time-out, a dead worker's.

They are in `sql/finish.sql`, with the locks that they take. Each is one statement: it holds the rows of the calls'
owners, who store nothing meanwhile, and so may not wait for this worker's loop.
"""

from __future__ import annotations

from .parts import Statements

statement = Statements()

statement(
    "end_session",
    "SELECT {s}.end_session(%(session)s, %(server)s, %(owner)s, %(idle)s::float8, false, %(reason)s, %(error)s)",
)
statement(
    "end_idle_session",
    "SELECT {s}.end_session(%(session)s, NULL, NULL, %(idle)s::float8, true, %(reason)s, %(error)s)",
)
statement(
    "end_worker",
    "SELECT * FROM {s}.end_worker(%(worker)s, %(reason)s, %(error)s, %(seen)s::timestamptz, %(locked)s::boolean)",
)
statement("finish_calls", "SELECT {s}.finish_calls(%(streams)b::bigint[], %(error)s)")
statement(
    "orphans",
    # Open calls of this worker that are not quite new; of those that it does not run, nobody would ever write the end.
    """
    SELECT number FROM {s}.streams
     WHERE worker = %(me)s AND final_seq IS NULL AND created_at < now() - interval '30 seconds'
    """,
)
