"""How much there is: events by partition, sessions, calls, readers and workers.

What is small is counted; of what is large PostgreSQL's own estimate is taken, and called so. Next: `cli/stats.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from psycopg import sql

from .desk import Desk
from .statements import stats as statements

__all__ = ["Calls", "Partition", "Sessions", "Stats", "Table", "Worker", "collect"]

COUNTED: Final = 32_000_000
"""Bytes up to which a table is counted: that takes some tens of milliseconds."""


@dataclass(frozen=True, slots=True)
class Partition:
    """Events of one time. `rate` is in events a second, over the part of that time which has passed; `going`: it is
    half detached, and hidden."""

    name: str
    lower: datetime
    upper: datetime
    events: int
    estimated: bool
    bytes: int
    rate: float | None
    going: bool


@dataclass(frozen=True, slots=True)
class Sessions:
    live: int
    live_estimated: bool
    ended: int
    ended_estimated: bool


@dataclass(frozen=True, slots=True)
class Calls:
    """Running calls of one method. `read` have a reader; `oldest` runs for so many seconds."""

    method: str | None
    calls: int
    read: int
    oldest: float


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that has not ended. `alive`: it holds its lock; it gave its last sign `silent` seconds ago."""

    number: int
    host: str
    pid: int
    revision: str
    started_at: datetime
    silent: float
    alive: bool
    calls: int
    readers: int


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    rows: int
    estimated: bool
    bytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """Everything at once, though not of one moment. `events_estimated`: at least one partition's number is."""

    at: datetime
    events: int
    events_estimated: bool
    bytes: int
    partitions: list[Partition]
    sessions: Sessions
    calls: int
    methods: list[Calls]
    readers: int
    standalone_readers: int
    workers: list[Worker]
    tables: list[Table]


def collect(desk: Desk) -> Stats:
    """Count."""
    named = {name: sql.Identifier(desk.schema, name).as_string() for name in ("events", "sessions")}
    [now] = desk.look("SELECT now() AS now")
    partitions = [_partition(desk, row) for row in desk.look(statements.PARTITIONS, named)]
    tables = [_table(desk, row) for row in desk.look(statements.TABLES, named)]
    methods = [Calls(**row) for row in desk.look(statements.CALLS)]
    [readers] = desk.look(statements.READERS)
    kept = [partition for partition in partitions if not partition.going]
    return Stats(
        at=now["now"],
        events=sum(partition.events for partition in kept),
        events_estimated=any(partition.estimated for partition in kept),
        bytes=sum(partition.bytes for partition in partitions),
        partitions=partitions,
        sessions=_sessions(desk, next(table for table in tables if table.name == "sessions"), named),
        calls=sum(each.calls for each in methods),
        methods=methods,
        readers=readers["readers"],
        standalone_readers=readers["standalone"],
        workers=[Worker(**row) for row in desk.look(statements.WORKERS)],
        tables=tables,
    )


def _partition(desk: Desk, row: dict[str, Any]) -> Partition:
    events, estimated = row["events"], True
    if row["heap"] <= COUNTED and not row["going"]:
        [counted] = desk.look(statements.PARTITION_COUNT, {"lower": row["lower"], "upper": row["upper"]})
        events, estimated = int(counted["events"]), False
    passed = (min(row["now"], row["upper"]) - row["lower"]).total_seconds()
    rate = round(events / passed, 3) if passed > 0 else None
    return Partition(row["name"], row["lower"], row["upper"], events, estimated, row["bytes"], rate, bool(row["going"]))


def _table(desk: Desk, row: dict[str, Any]) -> Table:
    if row["heap"] > COUNTED:
        return Table(row["name"], row["rows"], True, row["bytes"])
    name = sql.Identifier(row["name"])  # one of three
    [counted] = desk.look(sql.SQL("SELECT count(*) AS rows FROM {s}.{name}").format(s=desk.name, name=name))
    return Table(row["name"], counted["rows"], False, row["bytes"])


def _sessions(desk: Desk, table: Table, named: dict[str, str]) -> Sessions:
    index = desk.look(statements.LIVE_INDEX, named)
    estimated = bool(index) and index[0]["bytes"] > COUNTED
    live = index[0]["live"] if estimated else desk.look(statements.LIVE_SESSIONS)[0]["live"]
    return Sessions(live, estimated, max(table.rows - live, 0), estimated or table.estimated)
