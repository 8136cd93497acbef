"""`ensure_partitions` in the database: it makes what the plan says, once, and waits for nobody."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import sql

from mcp_pg_events import migrate
from mcp_pg_events.partitions import INTERVALS, Interval, Policy, ceiling, floor, parse_name, plan
from tests.support.schemas import partitions, query


@pytest.mark.parametrize("interval", INTERVALS)
def test_the_function_makes_what_the_plan_says(database: str, interval: Interval) -> None:
    migrate.upgrade(database, partition_interval=interval)
    assert len(partitions(database)) == 3
    with psycopg.connect(database) as connection:  # one transaction, and so one now()

        def ensure() -> int:
            return int(connection.execute("SELECT mcp_events.ensure_partitions(3)").fetchone()[0])  # type: ignore[index]

        now = connection.execute("SELECT now()").fetchone()[0]  # type: ignore[index]
        for changed in INTERVALS:
            connection.execute("UPDATE mcp_events.settings SET partition_interval = %s", [changed])
            before = partitions(connection)
            expected = plan(now, before, Policy(changed, 3)).create
            assert ensure() == len(expected)
            assert partitions(connection) == sorted([*before, *expected])
            assert ensure() == 0


def test_the_bounds_are_utc_whatever_the_session_says(database: str) -> None:
    migrate.upgrade(database)
    with psycopg.connect(
        database, autocommit=True, options="-c timezone=Asia/Kolkata -c datestyle=SQL,DMY"
    ) as connection:
        assert connection.execute("SELECT mcp_events.ensure_partitions(4)").fetchone() == (2,)
        assert connection.execute("SELECT mcp_events.ensure_partitions(4)").fetchone() == (0,)
    days = partitions(database)
    assert len(days) == 5
    assert all(day.lower == floor(day.lower, "day") and day.upper == ceiling(day.lower, "day") for day in days)


def test_a_detached_partition_does_not_keep_its_successor_from_being_made(migrated: str) -> None:
    name = partitions(migrated)[0].name
    with psycopg.connect(migrated, autocommit=True) as connection:
        detach = sql.SQL("ALTER TABLE mcp_events.events DETACH PARTITION {}")
        connection.execute(detach.format(sql.Identifier("mcp_events", name)))
    assert query(migrated, "SELECT ensure_partitions()") == [1]
    names = query(migrated, "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'events'::regclass")
    assert f"{name}_2" in names
    assert all(parse_name(made) is not None for made in names)
    query(migrated, "INSERT INTO events (stream, seq, payload) VALUES (1, 1, '{}')")


def test_many_workers_at_once_make_each_partition_once(migrated: str) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: query(migrated, "SELECT ensure_partitions(20)")[0], range(8)))
    assert sorted(made) == [0] * 7 + [18]


def test_making_a_partition_waits_for_no_reader_and_no_writer(migrated: str) -> None:
    with psycopg.connect(migrated) as busy, psycopg.connect(migrated, autocommit=True) as maker:
        busy.execute("INSERT INTO mcp_events.events (stream, seq, payload) VALUES (1, 1, '{}')")
        busy.execute("SELECT * FROM mcp_events.events")
        maker.execute("SET lock_timeout = '2s'")
        assert maker.execute("SELECT mcp_events.ensure_partitions(5)").fetchone() == (3,)


def test_when_nothing_is_missing_no_lock_is_taken(migrated: str) -> None:
    with psycopg.connect(migrated) as connection:
        connection.execute("SELECT mcp_events.ensure_partitions()")
        held = connection.execute(
            """SELECT locktype, relation::regclass::text FROM pg_locks
               WHERE pid = pg_backend_pid()
               AND (locktype = 'advisory' OR relation IN (SELECT inhrelid FROM pg_inherits))"""
        ).fetchall()
    assert held == []


def test_a_later_interval_holds_for_the_partitions_to_come(migrated: str) -> None:
    before = partitions(migrated)
    migrate.upgrade(migrated, partition_interval="hour")
    assert query(migrated, "SELECT partition_interval FROM settings") == ["hour"]
    assert partitions(migrated) == before
    query(migrated, "SELECT ensure_partitions(100)")
    assert len(partitions(migrated)) > len(before) + 20
