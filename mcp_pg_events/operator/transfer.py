"""Carries a session, with everything that is kept of it, into another database or schema, with its ids and its order.

An export is one snapshot. An import is one transaction: the file waits in temporary tables until it is complete and in
order, and nothing is changed otherwise. A client then resumes with the `Last-Event-ID` that it has. Next:
`cli/transfer.py`; `carried.py` has the form of the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, cast

import psycopg
from psycopg import sql

from ..errors import Error
from ..finals import final_error
from ..partitions import Interval, Partition, Policy, plan
from ..schema import REVISION
from .carried import FORMAT, VERSION, Broken, Line, dumped, read
from .desk import Desk, checked_id, no_session
from .statements import transfer as statements
from .statements.sessions import END_SESSION
from .text import counted

__all__ = ["Exported", "Imported", "export", "import_session"]

PARTITIONS: Final = 1000
"""How many partitions one import makes at most."""
CLOSE: Final = 100_000
LOCK_PATIENCE: Final = "3s"
NO_LIMIT: Final = 0.0
"""Of a statement's time: a file may come slowly."""


@dataclass(slots=True)
class Exported:
    """What was written, once all of it was. `running` calls end where the file is imported."""

    session: str = ""
    streams: int = 0
    events: int = 0
    running: int = 0


@dataclass(frozen=True, slots=True)
class Imported:
    """What was stored. `expired` events count as let go, `lost` calls ended with `worker_lost`; `ended`: the session
    lived on one worker, and ended with that."""

    session: str
    streams: int
    events: int
    expired: int
    lost: int
    partitions: int
    ended: bool


def export(desk: Desk, session_id: str, done: Exported) -> Iterator[str]:
    """The lines of a session's file, without their ends; `done` says at last what they were.

    It is a snapshot, for which a transaction is open until the last line was taken.

    Raises:
        Error: there is no such session.
    """
    asked = {"session": checked_id(desk, session_id)}
    with desk.transaction(writes=False, patience=NO_LIMIT, isolation="REPEATABLE READ"):
        rows = desk.run(statements.EXPORT_SESSION, asked)
        if not rows:
            raise no_session(desk, session_id)
        [now] = desk.run("SELECT now() AS now")
        head = {"format": FORMAT, "version": VERSION, "revision": REVISION, "exported_at": now["now"]}
        yield dumped("header", head | {"session": rows[0]})
        for row in _rows(desk, statements.EXPORT_STREAMS, asked):
            done.streams += 1
            runs = row["final_seq"] is None and row["request_key"] is not None and not row["shared"]
            done.running += runs and row["upstream_id"] is None
            yield dumped("stream", row)
        for row in _rows(desk, statements.EXPORT_EVENTS, asked):
            done.events += 1
            yield dumped("event", row)
        [counts] = desk.run(statements.EXPORT_COUNTS, asked)
        if counts != {"streams": done.streams, "events": done.events}:
            raise Error("The export does not have what the session has; run it again.")
        yield dumped("end", counts)
    done.session = session_id


def _rows(desk: Desk, statement: Any, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with desk.connection.cursor(name="mcp_pg_events_export") as cursor:
        cursor.itersize = 500
        cursor.execute(desk.composed(statement), values)
        yield from cursor


def import_session(desk: Desk, lines: Iterable[str], *, ttl: timedelta | None = None) -> Imported:
    """Store the session of a file. Events older than `ttl` count as expired.

    Calls that ran have no worker here, and end with `worker_lost`, as with the death of one; a session that lived on
    one worker ends. It needs the rights of the tables' owner: past events may need partitions.

    Raises:
        Broken: the file was cut, changed, or is something else.
        Error: an id is taken, or a retention pass runs.
    """
    with desk.transaction(writes=True, patience=NO_LIMIT):
        return _Import(desk, ttl).run(lines)


class _Import:
    def __init__(self, desk: Desk, ttl: timedelta | None) -> None:
        self._desk = desk
        self._ttl = ttl
        self._events = {"events": sql.Identifier(desk.schema, "events").as_string()}

    def run(self, lines: Iterable[str]) -> Imported:
        desk = self._desk
        desk.connection.execute(statements.CARRIED)
        session, end = self._stage(read(lines))
        desk.connection.execute("ANALYZE pg_temp.carried_streams, pg_temp.carried_events")
        self._check(end.values)
        desk.connection.execute(sql.SQL("SET LOCAL lock_timeout = {}").format(LOCK_PATIENCE))
        try:
            top = self._free(session["id"])
            going, existing = self._partitions()
            expired = self._expire(going)
            made = self._make_partitions(existing)
            self._raise_numbers(top)
            session["adrift"] = session["upstream"] is not None and session["ended_at"] is None
            desk.run(statements.CARRIED_INSERT, session)
            lost, ended = self._end_what_ran(session)
            self._verify(session["id"])
        except psycopg.errors.LockNotAvailable:
            raise Error("Something holds a lock that an import needs; nothing was imported, try again.") from None
        except psycopg.errors.UniqueViolation:
            raise Error("Somebody took an id of the file meanwhile; nothing was imported.") from None
        counts = end.values
        return Imported(session["id"], counts["streams"], counts["events"] - expired, expired, lost, made, ended)

    def _stage(self, lines: Iterator[Line]) -> tuple[dict[str, Any], Line]:
        """The file into temporary tables; its session and its end."""
        try:
            header = next(lines)
            line = self._copy("stream", next(lines), lines)
            line = self._copy("event", line, lines)
            for _ in lines:
                pass
        except psycopg.errors.UniqueViolation:
            raise Broken("The file has one id twice; nothing was imported.") from None
        return header.values["session"], line

    def _copy(self, kind: str, line: Line, lines: Iterator[Line]) -> Line:
        """Store lines of a kind; the first one of another."""
        if line.kind != kind:
            return line
        columns = list(line.values)
        head = sql.SQL(" ({}) FROM").format(sql.SQL(", ").join(map(sql.Identifier, columns))).as_string()
        statement = statements.CARRIED_COPY[kind].replace(" FROM", head, 1)
        with self._desk.connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            while line.kind == kind:
                copy.write_row([line.values[column] for column in columns])
                line = next(lines)
        return line

    def _check(self, counts: dict[str, Any]) -> None:
        for what, statement in statements.CARRIED_CHECKS.items():
            if self._desk.connection.execute(statement).rowcount:
                raise Broken(f"The file has {what}; nothing was imported.")
        [found] = self._desk.run(
            "SELECT (SELECT count(*) FROM pg_temp.carried_streams) AS streams, "
            "(SELECT count(*) FROM pg_temp.carried_events) AS events"
        )
        if found != counts:
            raise Broken(
                f"The file has {counted(found['streams'], 'stream')} and {counted(found['events'], 'event')}, and says "
                f"that it has {counts['streams']} and {counts['events']}; nothing was imported."
            )

    def _free(self, session_id: str) -> int:
        """The highest number of the file, none of whose ids is taken here."""
        [alone] = self._desk.run(statements.LOCK_RETENTION, self._events)
        if not alone["alone"]:
            raise Error("A retention pass runs in this schema; nothing was imported, try again.")
        [taken] = self._desk.run(statements.CARRIED_TAKEN, {"session": session_id})
        if taken["session"]:
            raise Error(f"There is a session {session_id!r} in schema {self._desk.schema}; nothing was imported.")
        number = taken["stream"] or taken["events"]
        if number is not None:
            raise Error(
                f"Stream {number} of the file is another one's in schema {self._desk.schema}; nothing was imported. A "
                "schema without sessions of its own takes every file."
            )
        return int(taken["top"] or 0)

    # --- partitions ---------------------------------------------------------------------------------------------------

    def _partitions(self) -> tuple[list[Partition], list[Partition]]:
        """Those on their way out, and all, with the one for the present among them."""
        self._desk.run("SELECT {s}.ensure_partitions()")
        self._desk.run(statements.LOCK_PARTITIONS, self._events)
        rows = self._desk.run(statements.PARTITIONS, self._events)
        bounds = [(Partition(row["lower"], row["upper"]), row["going"]) for row in rows]
        return [each for each, going in bounds if going], [each for each, _ in bounds]

    def _expire(self, going: list[Partition]) -> int:
        limits = {
            "ttl": self._ttl,
            "lowers": [each.lower for each in going],
            "uppers": [each.upper for each in going],
        }
        return int(self._desk.run(statements.CARRIED_EXPIRE, limits)[0]["events"])

    def _make_partitions(self, existing: list[Partition]) -> int:
        """Partitions for events of other times than those that there are; how many."""
        [settings] = self._desk.run("SELECT partition_interval FROM {s}.settings")
        policy = Policy(cast("Interval", settings["partition_interval"]), ahead=0)
        hours = self._desk.run(statements.CARRIED_HOURS, {"limit": 1_000_000})
        made = 0
        for row in hours:
            if any(each.lower <= row["hour"] < each.upper for each in existing):
                continue
            for partition in plan(row["hour"], existing, policy).create:
                made += 1
                if made > PARTITIONS:
                    raise Error(f"The events would need more than {PARTITIONS} partitions; give --ttl, or longer ones.")
                self._make(partition)
                existing.append(partition)
        return made

    def _make(self, partition: Partition) -> None:
        name = partition.name
        taken = "SELECT FROM pg_class WHERE oid = to_regclass(%s)"
        for place in range(2, 1000):
            if not self._desk.connection.execute(taken, [sql.Identifier(self._desk.schema, name).as_string()]).rowcount:
                break
            name = f"{partition.name}_{place}"
        self._desk.connection.execute(
            sql.SQL(statements.MAKE_PARTITION).format(
                s=sql.Identifier(self._desk.schema),
                name=sql.Identifier(self._desk.schema, name),
                lower=sql.Literal(partition.lower.isoformat()),
                upper=sql.Literal(partition.upper.isoformat()),
            )
        )

    # --- numbers and ends ---------------------------------------------------------------------------------------------

    def _raise_numbers(self, top: int) -> None:
        """Let the next stream have a number above those of the file. Workers may draw numbers at the same time."""
        values = {"streams": sql.Identifier(self._desk.schema, "streams").as_string(), "top": top}
        [row] = self._desk.run("SELECT nextval(pg_get_serial_sequence(%(streams)s, 'number')) AS number", values)
        missing = top - row["number"]
        if missing > CLOSE:
            # Nobody else draws as many between the two statements, so that this never sets it back.
            self._desk.run("SELECT setval(pg_get_serial_sequence(%(streams)s, 'number'), %(top)s)", values)
        elif missing > 0:
            self._desk.run(
                "SELECT count(nextval(pg_get_serial_sequence(%(streams)s, 'number'))) "
                "FROM generate_series(1, %(missing)s)",
                values | {"missing": missing},
            )

    def _end_what_ran(self, session: dict[str, Any]) -> tuple[int, bool]:
        reason = "worker_lost" if session["upstream"] is None else "upstream_lost"
        error = json.dumps(final_error(reason), separators=(",", ":"))
        bound = session["worker"] is not None and session["ended_at"] is None
        limits = {"error": error, "all": bound, "adrift": session["adrift"]}
        lost = self._desk.run(statements.CARRIED_LOST, limits)
        if bound:
            asked = {"session": session["id"], "reason": "worker_lost", "error": error}
            self._desk.run(END_SESSION, asked)
        return len(lost), bound

    def _verify(self, session_id: str) -> None:
        [counts] = self._desk.run(statements.CARRIED_COUNTS, {"session": session_id})
        if (counts["streams"], counts["events"]) != (counts["carried_streams"], counts["carried_events"]):
            raise Error("What was stored is not what the file has; nothing was imported.")
