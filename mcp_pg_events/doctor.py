"""What a database and its settings have to be for workers, checked one by one, each with what to do about it.

It connects as a worker would, reads, and changes nothing: the only thing that it sends is a notification to a channel
of its own. Every query has an end, and what one check cannot find out is that check's failure alone. Nothing here
knows the session side. Next: whoever shows the `Check`s.

Everything here blocks.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, LiteralString, cast

import psycopg
from psycopg import sql
from psycopg.rows import TupleRow

from .errors import Error
from .migrate import Target, connect, translated
from .partitions import Interval, ceiling, floor
from .schema import NEEDS, REVISION, check_schema

__all__ = ["Check", "Status", "examine"]

Status = Literal["ok", "warn", "fail"]

PATIENCE: Final = "5s"
LISTEN_PATIENCE: Final = 2.0
"""As long as a worker waits for its own notification."""
CONNECTIONS: Final = 9
"""Of one worker with default options: four for requests, four more, and the one that is opened first."""
SILENT: Final = timedelta(seconds=60)
OLD: Final = timedelta(days=90)
SKEW: Final = 5.0

_RIGHTS: Final = {
    **dict.fromkeys(("sessions", "streams", "workers", "inbox"), "SELECT, INSERT, UPDATE, DELETE"),
    "events": "SELECT, INSERT",
    "settings": "SELECT",
    "alembic_version": "SELECT",
}
_TIME_OUTS: Final = {
    "statement_timeout": 5,
    "transaction_timeout": 10,
    "idle_in_transaction_session_timeout": 5,
    "lock_timeout": 1,
}
"""Seconds below which each of them ends what a worker does on a good day."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `advice` says what to do, unless it is fine."""

    name: str
    status: Status
    found: str
    advice: str | None = None


def examine(dsn: str, *, schema: str, listen_dsn: str | None = None) -> list[Check]:
    """Look at everything that can be looked at; the checks in order.

    Where the database lets nobody in, or has no schema, the checks that need it are left out.

    Raises:
        ConfigurationError: the DSN or the schema's name cannot be right.
    """
    target = Target(dsn, check_schema(schema))
    with ExitStack() as stack:
        try:
            began = time.monotonic()
            connection = stack.enter_context(_connected(target))
            took = time.monotonic() - began
        except _Refused as refused:
            return [Check("connection", "fail", str(refused), "Check the DSN, that PostgreSQL runs, and pg_hba.conf.")]
        doctor = _Doctor(connection, target, Target(listen_dsn, schema) if listen_dsn else target, took)
        return list(doctor.checks())


class _Refused(Exception):
    """What one check could not find out, in a sentence."""


@contextmanager
def _connected(target: Target) -> Iterator[psycopg.Connection[TupleRow]]:
    with _explained():
        connection = connect(target, "mcp-pg-events doctor")
    connection.autocommit = True
    connection.prepare_threshold = None  # a pooler may give each transaction another server connection
    with connection:
        yield connection


@contextmanager
def _explained() -> Iterator[None]:
    try:
        with translated("doctor"):
            yield
    except Error as error:
        if error.__cause__ is None:  # not PostgreSQL's: the DSN itself cannot be read
            raise
        raise _Refused(str(error)) from error


class _Doctor:
    def __init__(self, connection: psycopg.Connection[TupleRow], target: Target, listen: Target, took: float) -> None:
        self._connection = connection
        self._schema = target.schema
        self._target = target
        self._listen = listen
        self._took = took

    def checks(self) -> Iterator[Check]:
        yield self._safely("connection", self._server)
        yield self._safely("pooler", self._pooler)
        yield self._safely("listen", self._round_trip)
        schema = self._safely("schema", self._revision)
        yield schema
        if schema.status != "fail":
            yield self._safely("role", self._rights)
            yield self._safely("partitions", self._partitions)
            yield self._safely("retention", self._retention)
            yield self._safely("workers", self._workers)
        yield self._safely("notifications", self._queue)
        yield self._safely("clock", self._clock)
        yield self._safely("connections", self._headroom)
        yield self._safely("time-outs", self._time_outs)
        yield self._safely("durability", self._durability)

    def _safely(self, name: str, look: Callable[[], tuple[Status, str, str | None]]) -> Check:
        try:
            with _explained():
                return Check(name, *look())
        except _Refused as refused:
            return Check(name, "fail", str(refused), "This check needs an answer; see what the sentence says.")

    # --- the server ---------------------------------------------------------------------------------------------------

    def _server(self) -> tuple[Status, str, str | None]:
        [(version, standby, read_only, user)] = self._ask(
            "SELECT current_setting('server_version'), pg_is_in_recovery(), "
            "current_setting('default_transaction_read_only'), current_user::text"
        )
        found = f"PostgreSQL {version.split()[0]} as {user}, connected in {self._took * 1000:.0f} ms"
        if standby:
            return "fail", f"{found}; it is a standby, which takes no writes", "Give the DSN of the primary."
        if read_only == "on":
            return (
                "fail",
                f"{found}; transactions are read-only",
                "Reset default_transaction_read_only for this role and database.",
            )
        if self._connection.info.server_version < 140000:
            return "fail", found, "Upgrade it: this package needs PostgreSQL 14 or later."
        return "ok", found, None

    def _pooler(self) -> tuple[Status, str, str | None]:
        # A pooler makes up the process number that its client is told.
        [(backend,)] = self._ask("SELECT pg_backend_pid()")
        if backend == self._connection.info.backend_pid:
            return "ok", "a direct connection", None
        direct = "" if self._listen is not self._target else "a direct listen_dsn (MCP_PG_EVENTS_LISTEN_DSN), and "
        return (
            "warn",
            "the DSN leads through a connection pooler",
            f"Give workers {direct}prepare_threshold=None where the pooler knows no prepared statements.",
        )

    def _round_trip(self) -> tuple[Status, str, str | None]:
        advice = "Set MCP_PG_EVENTS_LISTEN_DSN (listen_dsn) to a direct connection to the same database."
        channel = f"mcp_pg_events_doctor_{secrets.token_hex(8)}"
        # Two connections: through a pool of one, a notification to oneself comes back that nobody else's would.
        with _connected(self._listen) as listener, _connected(self._target) as sender:
            listener.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
            began = time.monotonic()
            sender.execute("SELECT pg_notify(%s, '')", [channel])
            for _ in listener.notifies(timeout=LISTEN_PATIENCE, stop_after=1):
                return "ok", f"a notification came in {(time.monotonic() - began) * 1000:.0f} ms", None
        return "fail", f"a notification did not come within {LISTEN_PATIENCE:.0f} s, so workers do not start", advice

    # --- the schema ---------------------------------------------------------------------------------------------------

    def _revision(self) -> tuple[Status, str, str | None]:
        migrate = "Run `mcp-pg-events migrate`" + (
            "." if self._schema == "mcp_events" else f" with --schema {self._schema}."
        )
        try:
            [(revision, oldest)] = self._ask(
                "SELECT (SELECT version_num FROM {s}.alembic_version), (SELECT oldest_worker FROM {s}.settings)"
            )
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            return "fail", f"there is no schema {self._schema} of mcp_pg_events", migrate
        except psycopg.errors.InsufficientPrivilege:
            return (
                "fail",
                f"the role may not read schema {self._schema}",
                "Run `mcp-pg-events migrate --worker-role ROLE` as the owner, with this role's name.",
            )
        if revision is None or oldest is None or revision < NEEDS:
            return "fail", f"revision {revision or 'none'}, but this version needs {NEEDS}", migrate
        if oldest > REVISION:
            return (
                "fail",
                f"revision {revision} serves workers from {oldest} on, and this version is {REVISION}",
                "Upgrade the package: pip install --upgrade mcp-pg-events.",
            )
        if revision < REVISION:
            return "warn", f"revision {revision}; this version knows {REVISION}", migrate
        return "ok", f"revision {revision} in {self._schema}", None

    def _rights(self) -> tuple[Status, str, str | None]:
        missing = []
        for table, rights in _RIGHTS.items():
            for right in rights.split(", "):
                query = "SELECT has_table_privilege(quote_ident({}) || '.' || {}, {})"
                if not self._ask(query, self._schema, table, right)[0][0]:
                    missing.append(f"{right} on {table}")
        for function in ("ensure_partitions(integer)", "note_timeline()"):
            query = "SELECT has_function_privilege(quote_ident({}) || '.' || {}, 'EXECUTE')"
            if not self._ask(query, self._schema, function)[0][0]:
                missing.append(f"EXECUTE on {function}")
        if missing:
            return (
                "fail",
                f"the role lacks {', '.join(missing)}",
                "Run `mcp-pg-events migrate --worker-role ROLE` as the owner, with this role's name.",
            )
        return "ok", "it has every right that a worker needs", None

    def _bounds(self) -> list[Any]:
        """The lower and upper bound, size and pending detach of each partition, the oldest first."""
        return self._ask(
            """
            SELECT bounds[1]::timestamptz AS lower, bounds[2]::timestamptz, pg_total_relation_size(c.oid),
                   i.inhdetachpending
              FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
              CROSS JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid),
                  '^FOR VALUES FROM \\(''([^'']+)''\\) TO \\(''([^'']+)''\\)$') AS bounds
             WHERE i.inhparent = (quote_ident({}) || '.events')::regclass AND bounds IS NOT NULL
             ORDER BY lower
            """,
            self._schema,
        )

    def _partitions(self) -> tuple[Status, str, str | None]:
        advice = "Run `mcp-pg-events retention` as the owner. Workers make them too, every ten minutes."
        [(now, interval)] = self._ask("SELECT now(), partition_interval FROM {s}.settings")
        bounds = self._bounds()
        pending = sum(1 for *_, waits in bounds if waits)
        position = now
        for lower, upper, _, waits in bounds:
            if lower <= position < upper and not waits:
                position = upper
        if position == now:
            return "warn", "there is none for the present moment", advice
        start = floor(now, cast("Interval", interval))
        found = f"made until {position.astimezone(UTC):%Y-%m-%d %H:%M} UTC, one per {interval}"
        if position < ceiling(ceiling(start, interval), interval):
            return "warn", f"{found}: less than one is made ahead", advice
        if pending:
            return (
                "warn",
                f"{found}; {pending} half detached",
                "Run `mcp-pg-events retention` again, which finishes it; look for long transactions in "
                "pg_stat_activity if it reports `contended`.",
            )
        return "ok", found, None

    def _retention(self) -> tuple[Status, str, str | None]:
        bounds = self._bounds()
        if not bounds:
            return "ok", "there is nothing to keep", None
        [(now,)] = self._ask("SELECT now()")
        age = max(now - bounds[0][0], timedelta())
        size = sum(each[2] for each in bounds) / 1e6
        days = "1 day" if age.days == 1 else f"{age.days} days"
        which = "the only partition" if len(bounds) == 1 else f"the oldest of {len(bounds)} partitions"
        found = f"{which} begins {days} ago; {size:,.1f} MB in all"
        if age > OLD:
            return "warn", found, "Run `mcp-pg-events retention --ttl 7d` (or longer) from cron, as the owner."
        return "ok", found, None

    def _workers(self) -> tuple[Status, str, str | None]:
        rows = self._ask(
            """
            SELECT w.number, w.host, now() - w.seen_at, l.pid IS NOT NULL
              FROM {s}.workers w LEFT JOIN pg_locks l
                ON l.locktype = 'advisory' AND l.objsubid = 2 AND l.granted
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
               AND l.classid = to_regnamespace(quote_ident({}))::oid AND l.objid = (w.number % 2147483648)::oid
             WHERE w.ended_at IS NULL ORDER BY w.number
            """,
            self._schema,
        )
        silent = [(number, host) for number, host, age, _ in rows if age > SILENT]
        live = len(rows) - len(silent)
        found = f"{live} live"
        if not silent:
            return "ok", found, None
        named = ", ".join(f"{number} on {host}" for number, host in silent[:3]) + (", ..." if len(silent) > 3 else "")
        found += f", {len(silent)} silent for over {SILENT.seconds} s ({named})"
        if live:
            return "fail", found, "Live workers should have ended their calls by now; see the logs of those."
        return "warn", found, "Start a worker: it ends their calls, and marks them dead."

    # --- what surrounds it --------------------------------------------------------------------------------------------

    def _queue(self) -> tuple[Status, str, str | None]:
        [(usage,)] = self._ask("SELECT pg_notification_queue_usage()")
        advice = "A session that listens sits in a transaction: find the oldest xact_start in pg_stat_activity, end it."
        return ("fail" if usage > 0.5 else "warn" if usage > 0.05 else "ok"), *(
            (f"the queue is {usage:.0%} full", advice if usage > 0.05 else None)
        )

    def _clock(self) -> tuple[Status, str, str | None]:
        before = datetime.now(UTC)
        [(there,)] = self._ask("SELECT clock_timestamp()")
        after = datetime.now(UTC)
        # Anywhere in the round trip would be right.
        skew = (there - after).total_seconds() if there > after else min((there - before).total_seconds(), 0)
        if abs(skew) > SKEW:
            side = "ahead of" if skew > 0 else "behind"
            return (
                "warn",
                f"the database's clock is {abs(skew):.0f} s {side} this machine's",
                "Run NTP on both. Ages are counted by the database's; only the times in logs disagree.",
            )
        return "ok", f"within {SKEW:.0f} s of this machine's", None

    def _headroom(self) -> tuple[Status, str, str | None]:
        [(limit, used, role, by_role, database, in_database)] = self._ask(
            """
            SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
                   (SELECT sum(numbackends) FROM pg_stat_database)::int, r.rolconnlimit,
                   (SELECT count(*) FROM pg_stat_activity WHERE usesysid = r.oid)::int, d.datconnlimit,
                   (SELECT count(*) FROM pg_stat_activity WHERE datid = d.oid)::int
              FROM pg_roles r, pg_database d WHERE r.rolname = current_user AND d.datname = current_database()
            """
        )
        bounds = {"max_connections": limit - used}
        if role >= 0:
            bounds["the role's CONNECTION LIMIT"] = role - by_role
        if database >= 0:
            bounds["the database's CONNECTION LIMIT"] = database - in_database
        tightest = min(bounds, key=lambda name: bounds[name])
        free = max(bounds[tightest], 0)
        if free < CONNECTIONS:
            return (
                "warn",
                f"{free} free under {tightest}; one more worker takes up to {CONNECTIONS}",
                f"Raise {tightest}, lower max_connections of the store, or pool with PgBouncer.",
            )
        return "ok", f"{free} free under {tightest}, room for {free // CONNECTIONS} more workers", None

    def _time_outs(self) -> tuple[Status, str, str | None]:
        rows = self._ask(
            "SELECT name, reset_val::bigint / 1000.0 FROM pg_settings WHERE name = ANY({}) AND reset_val <> '0'",
            [*_TIME_OUTS, "idle_session_timeout"],
        )
        biting = [
            f"{name} = {float(seconds):g} s"
            for name, seconds in rows
            # Idle is what a listening connection is between two pings.
            if float(seconds) < _TIME_OUTS.get(name, 60)
        ]
        if biting:
            return (
                "warn",
                f"{', '.join(biting)} for this role",
                "ALTER ROLE ... SET them to 0 for the workers' role: what they end is retried, or a call is lost.",
            )
        return "ok", "none of the server's ends what a worker does", None

    def _durability(self) -> tuple[Status, str, str | None]:
        rows = self._ask(
            "SELECT name FROM pg_settings WHERE name IN ('fsync', 'synchronous_commit', 'full_page_writes') "
            "AND reset_val = 'off' ORDER BY name"
        )
        if rows:
            return (
                "warn",
                f"off: {', '.join(name for (name,) in rows)}",
                "Turn it on: after a crash events may be gone that clients have seen, or the database be damaged.",
            )
        return "ok", "commits reach the disk", None

    def _ask(self, statement: LiteralString, *values: Any) -> list[Any]:
        """Run one statement with literals in place of `{}` and the schema in that of `{s}`; it may not take long."""
        composed = sql.SQL(statement).format(*map(sql.Literal, values), s=sql.Identifier(self._schema))
        with self._connection.transaction():
            # LOCAL: a pooler gives this server connection to somebody else next.
            self._connection.execute(sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(PATIENCE)))
            return self._connection.execute(composed).fetchall()
