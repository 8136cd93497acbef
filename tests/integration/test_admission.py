"""`max_sessions`: never more than the limit, whoever opens them at once, and a count only where one is needed."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import psycopg
import pytest

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import SessionKey, SessionLimit
from tests.support.log import VERSION, open_call, open_session, parts, query, running, until

WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = %s"

pytestmark = pytest.mark.anyio


async def admitted(store: PostgresStore, limit: int, *, server: str = "limited") -> SessionKey | None:
    """A new session under a limit; None where it was refused."""
    key = SessionKey(uuid4().hex, server, None, None)
    try:
        await store.log.open_session(
            key, initialize="{}", protocol_version=VERSION, request_id="0", request_key="i0", limit=limit
        )
    except SessionLimit:
        return None
    return key


def live(dsn: str) -> int:
    return int(query(dsn, "SELECT count(*) FROM sessions WHERE server = 'limited' AND ended_at IS NULL")[0][0])


async def test_sessions_that_many_workers_open_at_once_stay_within_the_limit(migrated_once: str) -> None:
    for limit in (1, 2, 7, 40):
        async with running(migrated_once, 3, max_connections=8) as stores:
            # One after the other at first, so that each worker has a count of its own to go by, all of other moments.
            opened = [await admitted(store, limit) for store in stores]
            key, _ = await open_session(stores[0])
            waiting = [asyncio.create_task(admitted(stores[n % 3], limit)) for n in range(60)]
            # Calls take numbers in between.
            calls = [asyncio.create_task(open_call(stores[n % 3], key, n)) for n in range(30)]
            opened += await asyncio.gather(*waiting)
            await asyncio.gather(*calls)
            let_in = [key for key in opened if key is not None]
            assert len(let_in) == live(migrated_once) == limit
            # Room that one of them leaves is found by any worker, and by one session alone.
            await stores[1].log.end_session(let_in[0], "deleted")
            again = await asyncio.gather(*(admitted(store, limit) for store in stores * 3))
            assert sum(key is not None for key in again) == 1
            assert live(migrated_once) == limit
        query(migrated_once, "UPDATE sessions SET ended_at = now(), ended_reason = 'deleted' WHERE ended_at IS NULL")


async def test_sessions_far_from_the_limit_are_not_counted(migrated_once: str) -> None:
    async with running(migrated_once, 2) as stores:
        assert all([await admitted(store, 1000) for store in stores])
        for store in stores:
            # A count would fail from here on.
            parts(store)._queries.count_sessions = b"SELECT 1 / 0"
        opened = await asyncio.gather(*(admitted(stores[n % 2], 1000) for n in range(100)))
        assert all(opened)
        # Other servers' sessions have a limit of their own, and a count.
        parts(stores[0])._queries.count_sessions = parts(stores[1])._queries.count_sessions
    assert live(migrated_once) == 102


async def test_a_count_waits_for_the_sessions_that_are_being_opened(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (opening, counting):
        assert await admitted(opening, 1000)
        with psycopg.connect(migrated_once) as connection:
            number = parts(opening).identity.number
            connection.execute("SELECT FROM mcp_events.workers WHERE number = %s FOR UPDATE", (number,))
            first = asyncio.create_task(admitted(opening, 1000))
            await until(lambda: query(migrated_once, WAITING, "transactionid") != [(0,)])
            second = asyncio.create_task(admitted(counting, 1000))
            await until(lambda: query(migrated_once, WAITING, "advisory") != [(0,)])
        assert await first
        assert await second
