"""The pool for single statements keeps its connections, whatever becomes of those who borrow them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import anyio
import psycopg
import pytest

from mcp_pg_events.database import Connection, Database
from mcp_pg_events.errors import DatabaseUnavailable
from tests.support.log import query, until

pytestmark = pytest.mark.anyio

SIZE = 3


@contextlib.asynccontextmanager
async def opened(dsn: str) -> AsyncIterator[Database]:
    database = Database(dsn, max_connections=SIZE, prepare_threshold=5)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


async def read(connection: Connection) -> object:
    return await (await connection.execute("SELECT 1")).fetchone()


async def test_callers_that_are_cancelled_cost_no_connection(migrated_once: str) -> None:
    """At any moment: while they wait for a connection, are given it, use it, and give it back."""
    rng = random.Random(3)

    async def cancelled(database: Database, way: int) -> None:
        work = [
            lambda: database.fetch(b"SELECT 1"),
            lambda: database.fetch_once(b"SELECT 1", {}),
            lambda: database.transaction(read),
        ][way % 3]
        task = asyncio.create_task(work())
        await asyncio.sleep(rng.choice([0, 0.0002, 0.001, rng.uniform(0, 0.004)]))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    async with opened(migrated_once) as database:
        for _ in range(60):
            await asyncio.gather(*(cancelled(database, way) for way in range(3 * SIZE)))
            assert await database.fetch(b"SELECT 1") == [(1,)]
        # All are there still, each held until the others are.
        meeting = asyncio.Barrier(SIZE)
        async with asyncio.timeout(5):
            await asyncio.gather(*(database.transaction(lambda connection: meeting.wait()) for _ in range(SIZE)))


WAITING = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE mcp%%'"


async def test_a_statement_ends_with_those_who_wait_for_it(migrated: str) -> None:
    query(migrated, "CREATE TABLE t (n int); INSERT INTO t VALUES (0)")
    async with opened(migrated) as database:
        with psycopg.connect(migrated, options="-c search_path=mcp_events") as blocking:
            blocking.execute("SELECT FROM t FOR UPDATE")
            changing = [
                asyncio.create_task(database.fetch(b"UPDATE mcp_events.t SET n = n + 1 RETURNING n", patience=60))
                for _ in range(SIZE)
            ]
            await until(lambda: query(migrated, WAITING) == [(SIZE,)])
            behind = [asyncio.create_task(database.fetch(b"SELECT 1", patience=60)) for _ in range(50)]
            await asyncio.sleep(0)
            for task in (*changing, *behind):
                task.cancel()
            async with asyncio.timeout(3):
                for task in (*changing, *behind):
                    with pytest.raises(asyncio.CancelledError):
                        await task
            assert query(migrated, WAITING) == [(0,)]
            # Nobody else has to wait for them.
            async with asyncio.timeout(2):
                assert await database.fetch(b"SELECT 1") == [(1,)]
    assert query(migrated, "SELECT n FROM t") == [(0,)]


async def test_a_cancellation_may_come_several_times(migrated: str) -> None:
    """As anyio's do, until its block is left."""
    query(migrated, "CREATE TABLE t (n int); INSERT INTO t VALUES (0)")
    async with opened(migrated) as database:
        with psycopg.connect(migrated, options="-c search_path=mcp_events") as blocking:
            blocking.execute("SELECT FROM t FOR UPDATE")
            with anyio.move_on_after(0.2):
                await database.fetch(b"UPDATE mcp_events.t SET n = n + 1 RETURNING n", patience=60)
            assert query(migrated, WAITING) == [(0,)]
        assert await database.fetch(b"SELECT n FROM mcp_events.t") == [(0,)]


async def test_a_statement_that_outlives_the_store_says_so(migrated_once: str) -> None:
    async with opened(migrated_once) as database:
        sleeping = asyncio.create_task(database.fetch(b"SELECT pg_sleep(30)", patience=30))
        await asyncio.sleep(0.1)
    with pytest.raises(DatabaseUnavailable, match="is being closed"):
        await sleeping
