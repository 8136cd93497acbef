"""How many events share a commit, where many callers append in step."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import Stream
from tests.support.log import NOTE, assert_streams_are_whole, open_call, open_session, parts, running

pytestmark = pytest.mark.anyio

CALLERS = 40
ROUNDS = 8


async def batches(store: PostgresStore, *, work: float, commit: float) -> list[int]:
    """The sizes of the batches of callers that each work for `work` seconds between appends, where a commit takes
    `commit` seconds more than it does."""
    key, _ = await open_session(store)
    streams = [await open_call(store, key, number) for number in range(1, CALLERS + 1)]
    sizes: list[int] = []
    appends: Any = parts(store).writer._appends
    store_own = appends.store_own

    async def noted(batch: Any, origin: str) -> Any:
        sizes.append(len(batch))
        await asyncio.sleep(commit)
        return await store_own(batch, origin)

    appends.store_own = noted

    async def call(stream: Stream) -> None:
        for _ in range(ROUNDS):
            time.sleep(work)  # noqa: ASYNC251 (a caller that keeps the loop busy)
            await store.log.append(stream, NOTE)

    await asyncio.gather(*(call(stream) for stream in streams))
    return sizes


async def test_busy_callers_in_step_are_stored_in_two_halves_that_take_turns(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        sizes = await batches(store, work=0.0001, commit=0.0)
        assert sum(sizes) == CALLERS * ROUNDS
        assert sum(size <= CALLERS // 2 for size in sizes) >= ROUNDS, sizes
    assert_streams_are_whole(migrated)


async def test_a_slow_commit_is_shared_by_all_who_wait(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        sizes = await batches(store, work=0.0, commit=0.05)
        assert sum(sizes) == CALLERS * ROUNDS
        assert sizes.count(CALLERS) == ROUNDS, sizes
    assert_streams_are_whole(migrated)
