"""Reads of what is recent: a connection of their own, a plan that is kept, and another way where that is lost."""

from __future__ import annotations

from datetime import timedelta

import pytest

from mcp_pg_events.fetcher import STEP
from tests.support.log import NOTE, open_call, open_session, parts, query, running, until

pytestmark = pytest.mark.anyio

PREPARED = "SELECT statement, generic_plans, custom_plans FROM pg_prepared_statements"


async def test_recent_events_are_read_with_one_plan_and_old_ones_with_their_own(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        await store.log.append(stream, NOTE)
        bound = store.log.bound_of(stream)
        fetcher = parts(store).fetcher
        kept = fetcher._kept
        assert kept is not None and kept.connection is not None
        for _ in range(5):
            page = await store.log.read(stream.number, 0, bound)
            assert [(event.seq, event.payload) for event in page.events] == [(1, NOTE)]
        # The first one told the database's clock.
        ((statement, *plans),) = await (await kept.connection.execute(PREPARED)).fetchall()
        assert plans == [4, 0]
        # Ten minutes on, another constant has its place.
        assert fetcher._clock is not None
        fetcher._clock -= STEP
        await store.log.read(stream.number, 0, bound - STEP)
        ((later, *plans),) = await (await kept.connection.execute(PREPARED)).fetchall()
        assert later != statement and plans == [1, 0]
        page = await store.log.read(stream.number, 0, bound - timedelta(days=1))
        assert [event.seq for event in page.events] == [1]
        assert await (await kept.connection.execute(PREPARED)).fetchall() == [(later, 1, 0)]


async def test_a_connection_that_is_lost_costs_no_read(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        await store.log.append(stream, NOTE)
        bound = store.log.bound_of(stream)
        kept = parts(store).fetcher._kept
        assert kept is not None
        for _ in range(3):
            await store.log.read(stream.number, 0, bound)
            assert kept.connection is not None
            pid = kept.connection.info.backend_pid
            query(migrated_once, "SELECT pg_terminate_backend(%s, 5000)", pid)
            page = await store.log.read(stream.number, 0, bound)
            assert [event.seq for event in page.events] == [1]
            await until(lambda: kept.connection is not None)
            assert kept.connection.info.backend_pid != pid
