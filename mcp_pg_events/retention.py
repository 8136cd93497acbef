"""One retention pass: partitions made ahead, expired ones dropped, and then the rows that nothing refers to any more.

Run from cron (`mcp-pg-events retention`), by the tables' owner. A pass may be killed at any moment: the next one goes
on from there. It never waits long for a lock, since whatever waits behind it would wait as long; a partition that
somebody still reads is hidden, `contended`, and dropped by a later pass. Times are the database's. Nothing here knows
the session side. Next: whoever reads the `Report`.

Everything here blocks.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, LiteralString, cast

import psycopg
from psycopg import sql

from . import telemetry
from .archive import archive
from .errors import ConfigurationError
from .finals import final_error
from .migrate import Target, connect, translated
from .partitions import Interval, Partition, Policy, ceiling, parse_name, plan
from .schema import check_schema

__all__ = ["Outcome", "Report", "run"]

AHEAD: Final = 2
BATCH: Final = 5000
FLOORS: Final = 1000
"""How many streams may be locked at a time: nobody stores into them meanwhile."""
LOCK_PATIENCE: Final = "3s"
"""How long a concurrent detach may wait for those who read the partition. It holds nobody up meanwhile."""
DROP_PATIENCE: Final = "200ms"
"""How long a lock may be waited for that others would queue behind."""
MARK: Final = "mcp_pg_events: expired"
"""The comment of a partition that is on its way out. Only a table with it may be dropped once it is hidden or detached:
somebody else may detach a partition to keep it."""

Result = Literal["dropped", "kept", "expired", "contended", "missing", "pending"]
"""`expired`: would be dropped, were this no rehearsal. `contended`: somebody reads it, so it is not gone yet; it may be
hidden already, and the next pass goes on. `missing`: somebody else dropped or detached it meanwhile. `pending`: it is
being detached by somebody else, and left alone."""

_BUSY: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.ObjectNotInPrerequisiteState,  # another partition is being detached
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one partition. `bytes` is the room that it took, `archived` the file that has its events now."""

    name: str
    lower: datetime | None
    upper: datetime | None
    result: Result
    bytes: int
    archived: str | None = None


@dataclass(slots=True)
class Report:
    """What one pass did: partitions made and dropped, rows removed by table, seconds.

    `busy`: another pass runs. `locked`: a lock that somebody holds kept it from making partitions, or from going on.
    """

    created: int = 0
    partitions: list[Outcome] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    dry_run: bool = False
    busy: bool = False
    locked: bool = False

    @property
    def contended(self) -> bool:
        """Whether something is left to do that could not be done now."""
        return self.busy or self.locked or any(outcome.result == "contended" for outcome in self.partitions)


@dataclass(frozen=True, slots=True)
class _Found:
    """A table that is, or was, a partition."""

    name: str
    partition: Partition | None
    pending: bool
    attached: bool
    marked: bool
    bytes: int

    @property
    def begun(self) -> bool:
        """Whether an earlier pass hid or detached it, and did not get to drop it."""
        return self.marked and (self.pending or not self.attached)


def run(
    dsn: str,
    *,
    schema: str,
    ttl: timedelta | None = None,
    dry_run: bool = False,
    archive_to: Path | None = None,
    on_partition: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Make one pass over `schema`; what it did.

    Without `ttl` partitions are made ahead, and nothing is removed. `on_partition` is told of each expired partition
    before its turn: its name, its place from 1, and how many there are.

    Raises:
        ConfigurationError: `ttl` is shorter than a partition, or a pooler in transaction mode stands between.
        DatabaseUnavailable, NotMigrated, Error: it cannot be done here, or not by this role.
    """
    began = time.monotonic()
    with (
        telemetry.span("retention"),
        translated("retention"),
        connect(Target(dsn, schema), "mcp-pg-events retention") as connection,
    ):
        connection.autocommit = True
        _refuse_pooler(connection, Target(dsn, schema))
        report = _Pass(connection, check_schema(schema), ttl, dry_run, archive_to, on_partition).run()
    report.seconds = time.monotonic() - began
    results = [outcome.result for outcome in report.partitions]
    telemetry.retention(
        report.seconds, partitions={result: results.count(result) for result in set(results)}, rows=report.rows
    )
    return report


class _Pass:
    def __init__(
        self,
        connection: psycopg.Connection[Any],
        schema: str,
        ttl: timedelta | None,
        dry_run: bool,
        archive_to: Path | None,
        on_partition: Callable[[str, int, int], None] | None,
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._ttl = ttl
        self._dry_run = dry_run
        self._archive_to = archive_to
        self._on_partition = on_partition or (lambda name, place, count: None)
        self._report = Report(dry_run=dry_run)

    def run(self) -> Report:
        self._do("SET search_path = {schema}, pg_temp")
        self._do("SET lock_timeout = {}", DROP_PATIENCE)
        # Its own session's: whatever a role or database has set would end a pass in the middle, or be misread.
        self._do("SET statement_timeout = 0")
        self._do("SET timezone = 'UTC'")
        self._do("SET datestyle = 'ISO, YMD'")
        try:
            self._go()
        except psycopg.errors.LockNotAvailable:
            self._report.locked = True
        return self._report

    def _go(self) -> None:
        # By the schema's name, without which a schema that this role may not use is one that is not there.
        [(interval, now)] = self._do("SELECT partition_interval, now() FROM {schema}.settings")
        # Before anything is marked: a database of an earlier revision has another one.
        self._do("SELECT 'raise_floors(regclass, timestamptz, bigint, integer)'::regprocedure")
        policy = Policy(cast("Interval", interval), AHEAD, self._ttl)
        if self._ttl is not None and self._ttl < _length(policy.interval):
            raise ConfigurationError(
                f"Events leave with their partition, which is one {interval} long, so that --ttl cannot be shorter; "
                "`mcp-pg-events migrate --partition-interval hour` makes shorter ones from now on."
            )
        [(alone,)] = self._do(
            "SELECT pg_try_advisory_lock(hashtextextended('mcp_pg_events.retention', 'events'::regclass::oid::bigint))"
        )
        if not alone:
            self._report.busy = True
            return
        if not self._dry_run:
            self._make()
        found = self._find()
        going: list[_Found] = []
        if self._ttl is not None:
            ours = [each.partition for each in found if each.partition is not None and not each.pending]
            expired = set(plan(now, ours, policy).drop)
            going = [each for each in found if each.begun or (each.partition in expired and not each.pending)]
        for place, each in enumerate(going, 1):
            self._on_partition(each.name, place, len(going))
            self._let_go(each)
        for each in (each for each in found if each not in going):
            if each.marked and not each.begun and not self._dry_run:
                # Marked by a pass that was killed, and of one that kept events for less long.
                self._unmark(each)
            self._note(each, "pending" if each.pending and not each.marked else "kept")
        if self._ttl is not None and not self._dry_run:
            gone = ("dropped", "missing")
            left = {outcome.lower for outcome in self._report.partitions if outcome.result not in gone}
            self._remove_rows(min((lower for lower in left if lower is not None), default=now))

    # --- partitions ---------------------------------------------------------------------------------------------------

    def _make(self) -> None:
        try:
            [(self._report.created,)] = self._do("SELECT ensure_partitions({})", AHEAD)
        except psycopg.errors.LockNotAvailable:
            # There are some ahead, and a worker makes them too; what has expired may go all the same.
            self._report.locked = True

    def _find(self) -> list[_Found]:
        """Every table that is ours: partitions by their names, and detached ones by their comment, the oldest first."""
        rows = self._do(
            """
            SELECT c.relname, bounds[1]::timestamptz, bounds[2]::timestamptz, coalesce(i.inhdetachpending, false),
                   i.inhrelid IS NOT NULL, obj_description(c.oid, 'pg_class') IS NOT DISTINCT FROM {mark},
                   coalesce(pg_total_relation_size(c.oid), 0)
              FROM pg_class c LEFT JOIN pg_inherits i ON i.inhrelid = c.oid AND i.inhparent = 'events'::regclass
              LEFT JOIN LATERAL regexp_match(pg_get_expr(c.relpartbound, c.oid),
                  '^FOR VALUES FROM \\(''([^'']+)''\\) TO \\(''([^'']+)''\\)$') AS bounds ON true
             WHERE c.relkind = 'r'
               AND c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'events'::regclass)
               AND (bounds IS NOT NULL OR i.inhrelid IS NULL AND obj_description(c.oid, 'pg_class') = {mark})
             ORDER BY bounds[2]::timestamptz NULLS FIRST, c.relname
            """,
        )
        return [
            _Found(name, Partition(lower, upper) if upper is not None else None, pending, attached, marked, size)
            for name, lower, upper, pending, attached, marked, size in rows
            if parse_name(name) is not None
        ]

    def _let_go(self, found: _Found) -> None:
        """Archive, detach and drop one partition, from wherever an earlier pass got."""
        if self._dry_run:
            self._note(found, "expired")
            return
        archived: str | None = None
        detached = not found.attached
        try:
            if self._archive_to is not None:
                archived = str(archive(self._connection, self._schema, found.name, self._archive_to))
            if not found.begun:
                self._raise_floors(found)
                self._do("COMMENT ON TABLE {name} IS {mark}", name=found.name)
            self._do("SET lock_timeout = {}", LOCK_PATIENCE)
            if not detached:
                how = "FINALIZE" if found.pending else "CONCURRENTLY"
                self._do(f"ALTER TABLE events DETACH PARTITION {{name}} {how}", name=found.name)
                detached = True
            self._do("DROP TABLE {name}", name=found.name)
        except _BUSY:
            # Somebody reads it, or it waits for another one that somebody reads.
            if any(each.name == found.name and each.attached and not each.pending for each in self._find()):
                self._unmark(found)
            self._note(found, "contended", archived)
        except psycopg.errors.UndefinedTable:
            if not detached:
                self._unmark(found)
            self._note(found, "missing", archived)
        else:
            self._note(found, "dropped", archived)
        finally:
            self._do("SET lock_timeout = {}", DROP_PATIENCE)

    def _raise_floors(self, found: _Found) -> None:
        """Page by page, each in a transaction of its own."""
        assert found.partition is not None
        after: int | None = 0
        while after is not None:
            [(after,)] = self._do(
                "SELECT raise_floors({}::regclass, {}, {}, {})",
                *(_quoted(found.name), found.partition.upper, after, FLOORS),
            )

    def _unmark(self, found: _Found) -> None:
        """Take the mark from a table that no pass has hidden: somebody else may detach it, to keep it."""
        with contextlib.suppress(psycopg.errors.UndefinedTable, *_BUSY):
            self._do("COMMENT ON TABLE {name} IS NULL", name=found.name)

    def _note(self, found: _Found, result: Result, archived: str | None = None) -> None:
        lower = found.partition.lower if found.partition is not None else None
        upper = found.partition.upper if found.partition is not None else None
        self._report.partitions.append(Outcome(found.name, lower, upper, result, found.bytes, archived))

    # --- rows that nothing refers to any more -------------------------------------------------------------------------

    def _remove_rows(self, horizon: datetime) -> None:
        """Batch by batch, each in a transaction of its own, until there is no whole batch of anything."""
        error = json.dumps(final_error("session_ended"), separators=(",", ":"))
        # What a crash takes back here, the next pass removes again.
        self._do("SET synchronous_commit = off")
        full = True
        while full:
            try:
                removed = self._do("SELECT * FROM remove_rows({}, {}, {}, {})", horizon, self._ttl, error, BATCH)
            except psycopg.errors.LockNotAvailable:
                # Somebody works with one of them; the next pass finds the rest.
                return
            full = any(count >= BATCH for _, count in removed)
            for kind, count in removed:
                if count:
                    self._report.rows[kind] = self._report.rows.get(kind, 0) + count

    # --- statements ---------------------------------------------------------------------------------------------------

    def _do(self, statement: LiteralString, *values: Any, name: str | None = None) -> list[Any]:
        """Run one statement with literals in the place of `{}`, and an identifier in that of `{name}`; its rows."""
        named: dict[str, sql.Composable] = {"schema": sql.Identifier(self._schema), "mark": sql.Literal(MARK)}
        if name is not None:
            named["name"] = sql.Identifier(name)
        composed = sql.SQL(statement).format(*map(sql.Literal, values), **named)
        cursor = self._connection.execute(composed)
        return cursor.fetchall() if cursor.description else []


def _refuse_pooler(connection: psycopg.Connection[Any], target: Target) -> None:
    """Raise where a pooler gives each transaction another connection.

    A pass's lock and settings belong to its session: others would go on with them, and no later pass would get the
    lock. In session mode nothing is amiss, but PgBouncer makes up the process number there too.
    """
    own = {_backend(connection)}
    if own == {connection.info.backend_pid}:
        return
    with connect(target, "mcp-pg-events retention") as other:
        other.autocommit = True
        for _ in range(5):
            # Which it was that another session has just had, or one after the other in turn.
            backend = _backend(other)
            own.add(_backend(connection))
            if backend in own or len(own) > 1:
                raise ConfigurationError(
                    "The DSN leads through a pooler in transaction mode, where the lock and the settings of a pass "
                    "would stay behind for others; give a direct connection."
                )


def _backend(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT pg_backend_pid()", prepare=False).fetchone()
    assert row is not None
    return int(row[0])


def _length(interval: Interval) -> timedelta:
    start = datetime(
        2001, 2, 1, tzinfo=UTC
    )  # of the shortest month, so that no ttl is refused which another one allows
    return ceiling(start, interval) - start


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
