"""The pool for single statements keeps its connections, whatever becomes of those who borrow them."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator

import psycopg
import pytest

from mcp_pg_events.database import Connection, Database
from mcp_pg_events.errors import StoreClosed
from tests.support.log import query

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
        await asyncio.gather(*(database.fetch(b"SELECT pg_sleep(0.05)") for _ in range(SIZE)))
        assert database._pool.get_stats()["pool_size"] <= SIZE


async def test_a_caller_that_is_cancelled_goes_at_once_and_its_statement_ends(migrated: str) -> None:
    query(migrated, "CREATE TABLE t (n int); INSERT INTO t VALUES (0)")
    async with opened(migrated) as database:
        with psycopg.connect(migrated, options="-c search_path=mcp_events") as blocking:
            blocking.execute("SELECT FROM t FOR UPDATE")
            changing = asyncio.create_task(
                database.fetch(b"UPDATE mcp_events.t SET n = n + 1 RETURNING n", patience=10)
            )
            waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'UPDATE mcp%%'"
            async with asyncio.timeout(5):
                while query(migrated, waits) != [(1,)]:  # noqa: ASYNC110 (only the database can tell)
                    await asyncio.sleep(0.01)
            changing.cancel()
            async with asyncio.timeout(1):
                with pytest.raises(asyncio.CancelledError):
                    await changing
        async with asyncio.timeout(5):
            while query(migrated, "SELECT n FROM t") != [(1,)]:  # noqa: ASYNC110 (only the database can tell)
                await asyncio.sleep(0.01)


async def test_a_statement_that_outlives_the_store_is_told_that_it_is_closed(migrated_once: str) -> None:
    async with opened(migrated_once) as database:
        sleeping = asyncio.create_task(database.fetch(b"SELECT pg_sleep(30)", patience=30))
        await asyncio.sleep(0.1)
    with pytest.raises(StoreClosed):
        await sleeping
