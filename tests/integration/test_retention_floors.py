"""What streams remember of a partition that goes: raised in pages, in one order, so that nobody is held up for long."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from mcp_pg_events import migrate, retention
from tests.support.ageing import age
from tests.support.log import partitions, query

STREAMS = 2500


@pytest.fixture
def floors(migrated: str) -> tuple[str, str]:
    """A database with many streams that go on and have an event in its oldest partition; and that."""
    age(migrated)
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key, created_at) "
        "SELECT 's', n::text, 'i' || n, now() - interval '12 days' FROM generate_series(1, %s) n",
        STREAMS,
    )
    query(
        migrated,
        "INSERT INTO events (stream, seq, created_at, payload) "
        "SELECT number, 3, date_trunc('day', now(), 'UTC') - interval '12 days', '{}' FROM streams",
    )
    # The order in the table is another one now.
    query(migrated, "UPDATE streams SET worker = 1 WHERE number % 3 = 0")
    return migrated, partitions(migrated)[0]


def test_floors_are_raised_in_pages_and_by_the_number(floors: tuple[str, str]) -> None:
    dsn, name = floors
    numbers = [number for (number,) in query(dsn, "SELECT number FROM streams ORDER BY number")]
    page = "SELECT raise_floors(%s::regclass, date_trunc('day', now(), 'UTC') - interval '11 days', %s, 1000)"
    assert query(dsn, page, name, 0) == [(numbers[999],)]
    assert query(dsn, "SELECT max(number), count(*) FROM streams WHERE floor = 3") == [(numbers[999], 1000)]
    assert query(dsn, page, name, numbers[999]) == [(numbers[1999],)]
    assert query(dsn, page, name, numbers[1999]) == [(numbers[-1],)]
    assert query(dsn, page, name, numbers[-1]) == [(None,)]
    assert query(dsn, "SELECT count(*) FROM streams WHERE floor = 3") == [(STREAMS,)]


def test_streams_are_locked_in_the_order_of_their_numbers(floors: tuple[str, str]) -> None:
    dsn, name = floors
    numbers = [number for (number,) in query(dsn, "SELECT number FROM streams ORDER BY number")]
    held = numbers[500]
    statement = "SELECT raise_floors(%s::regclass, now() - interval '10 days', 0, 1000)"
    with psycopg.connect(dsn) as holder:
        holder.execute("SELECT FROM mcp_events.streams WHERE number = %s FOR UPDATE", [held])
        raising = threading.Thread(target=query, args=(dsn, statement, name))
        raising.start()
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%raise_floors%%'"
        )
        deadline = time.monotonic() + 10
        while query(dsn, waiting) != [(1,)]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        free = query(dsn, "SELECT number FROM streams ORDER BY number FOR UPDATE SKIP LOCKED")
        holder.rollback()
        raising.join()
    assert [number for (number,) in free] == numbers[501:]


def test_a_pass_raises_them_page_by_page(floors: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    dsn, _ = floors
    monkeypatch.setattr(retention, "FLOORS", 600)
    pages = []
    do = retention._Pass._do

    def counted(self: Any, statement: Any, *values: Any, **options: Any) -> Any:
        rows = do(self, statement, *values, **options)
        if "SELECT raise_floors" in statement:
            pages.append(query(dsn, "SELECT count(*) FROM streams WHERE floor = 3")[0][0])
        return rows

    monkeypatch.setattr(retention._Pass, "_do", counted)
    retention.run(dsn, schema="mcp_events", ttl=timedelta(days=7))
    assert pages[:6] == [600, 1200, 1800, 2400, 2500, 2500]


def test_a_call_of_the_function_raises_some_and_the_next_goes_on(floors: tuple[str, str]) -> None:
    dsn, name = floors
    for raised in (1000, 2000, 2500):
        assert query(dsn, "SELECT * FROM drop_expired('7 days')") == [(name, "floors raised")]
        assert query(dsn, "SELECT count(*) FROM streams WHERE floor = 3") == [(raised,)]
        assert name in partitions(dsn)
    rows = query(dsn, "SELECT * FROM drop_expired('7 days')")
    assert [result for _, result in rows] == ["dropped"] * 5
    assert name not in partitions(dsn)


def test_the_migration_leaves_one_function_which_older_programs_can_call(floors: tuple[str, str]) -> None:
    dsn, name = floors
    migrate.downgrade(dsn, revision="0005")
    query(
        dsn,
        "CREATE FUNCTION raise_floors(partition regclass, upper_bound timestamptz) RETURNS bigint LANGUAGE sql "
        "AS 'SELECT 0::bigint'",
    )
    migrate.upgrade(dsn)
    assert query(dsn, "SELECT count(*) FROM pg_proc WHERE proname = 'raise_floors'") == [(1,)]
    query(dsn, "SELECT raise_floors(%s::regclass, now() - interval '10 days')", name)
    assert query(dsn, "SELECT count(*) FROM streams WHERE floor = 3") == [(STREAMS,)]
