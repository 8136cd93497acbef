"""Statements straight over libpq: values both ways, errors, cancellation, a connection that breaks."""

from __future__ import annotations

import asyncio
import functools
from datetime import UTC, datetime

import psycopg
import pytest
from psycopg import errors

from mcp_pg_events.arrays import Int8Array, TextArray
from mcp_pg_events.database import connect
from mcp_pg_events.direct import Direct
from tests.support.log import query, until

pytestmark = pytest.mark.anyio

MOMENT = datetime(2026, 7, 28, 12, 30, 0, 250_001, tzinfo=UTC)
ECHO = b"""
    SELECT %(number)s, %(text)s || '%%', %(moment)s, %(numbers)b, %(texts)b, NULL::bigint, %(number)s > 0, n::bigint
      FROM unnest(%(numbers)b::bigint[]) n
"""
VALUES = {"number": -(2**62), "text": "é\n'", "moment": MOMENT}


def sleeps(dsn: str, pid: int) -> bool:
    """Whether a statement of this backend's is in `pg_sleep`."""
    return query(dsn, "SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = %s", pid) == [(True,)]


@pytest.mark.parametrize("prepare_threshold", [5, None])
async def test_values_come_back_as_they_went(migrated_once: str, prepare_threshold: int | None) -> None:
    connection = await connect(migrated_once, prepare_threshold=prepare_threshold)
    try:
        direct = Direct(connection)
        for numbers in ([1, 2, -3], [7], []):
            rows = await direct.fetch(
                ECHO, VALUES | {"numbers": Int8Array(numbers), "texts": TextArray([b"a", "ü".encode(), None])}
            )
            assert [row[:3] + row[5:] for row in rows] == [
                (VALUES["number"], "é\n'%".encode(), MOMENT, None, False, number) for number in numbers
            ]
        cursor = await connection.execute("SELECT count(*) FROM pg_prepared_statements")
        assert await cursor.fetchall() == [(0 if prepare_threshold is None else 1,)]
    finally:
        await connection.close()


async def test_a_statement_larger_than_the_sockets_buffers_is_sent_whole(migrated_once: str) -> None:
    connection = await connect(migrated_once)
    try:
        direct = Direct(connection)
        for size in (20_000_000, 10):
            rows = await direct.fetch(b"SELECT %(text)s, octet_length(%(text)s)::bigint", {"text": "x" * size})
            assert rows == [(b"x" * size, size)]
    finally:
        await connection.close()


async def test_an_error_leaves_the_connection_usable_by_both(migrated_once: str) -> None:
    connection = await connect(migrated_once)
    try:
        direct = Direct(connection)
        for _ in range(3):
            with pytest.raises(errors.DivisionByZero):
                await direct.fetch(b"SELECT 1 / (%(number)s - 1)", {"number": 1})
            assert await direct.fetch(b"SELECT %(number)s", {"number": 3}) == [(3,)]
            assert await (await connection.execute("SELECT 4")).fetchall() == [(4,)]
        with pytest.raises(errors.UndefinedTable):
            await direct.fetch(b"SELECT FROM nowhere WHERE %(number)s = 1", {"number": 1})
        assert await direct.fetch(b"SELECT %(number)s", {"number": 5}) == [(5,)]
    finally:
        await connection.close()


async def test_a_cancelled_statement_takes_its_connection_with_it(migrated_once: str) -> None:
    connection = await connect(migrated_once)
    direct = Direct(connection)
    waiting = asyncio.create_task(direct.fetch(b"SELECT pg_sleep(60), %(number)s", {"number": 1}))
    await until(functools.partial(sleeps, migrated_once, connection.info.backend_pid))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert connection.closed
    # The number of its socket is free, and whoever has it next is heard.
    other = await connect(migrated_once)
    assert await Direct(other).fetch(b"SELECT %(number)s", {"number": 1}) == [(1,)]
    await other.close()
    await connection.close()


async def test_a_connection_that_breaks_says_so_and_its_sockets_number_serves_the_next(migrated_once: str) -> None:
    for _ in range(3):
        connection = await connect(migrated_once)
        socket, pid = connection.pgconn.socket, connection.info.backend_pid
        waiting = asyncio.create_task(Direct(connection).fetch(b"SELECT pg_sleep(60), %(number)s", {"number": 1}))
        await until(functools.partial(sleeps, migrated_once, pid))
        query(migrated_once, "SELECT pg_terminate_backend(%s)", pid)
        with pytest.raises(psycopg.OperationalError):
            await waiting
        assert connection.closed
        other = await connect(migrated_once)
        assert other.pgconn.socket == socket
        assert await Direct(other).fetch(b"SELECT %(number)s", {"number": 1}) == [(1,)]
        await other.close()
        await connection.close()
