"""What a client can still resume when events have gone: the table of docs/explanation/retention.md, row by row."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from mcp_pg_events import PostgresStore, chores, retention
from mcp_pg_events.backend import CursorRejected, SessionKey, Stream
from tests.support.ageing import age, grow_old
from tests.support.log import (
    NOTE,
    RESULT,
    drop_partitions,
    open_call,
    open_session,
    partitions,
    parts,
    query,
    running,
    standalone,
    until,
)

pytestmark = pytest.mark.anyio

WEEK = timedelta(days=7)


async def let_go(dsn: str) -> retention.Report:
    return await asyncio.to_thread(retention.run, dsn, schema="mcp_events", ttl=WEEK)


async def resumed(store: PostgresStore, key: SessionKey, stream: Stream, after: int) -> list[int] | str:
    """The numbers that a client gets which comes back with this cursor, or why it gets none."""
    try:
        held = await store.log.attach(key, stream.number, after, patience=5)
    except CursorRejected as rejected:
        return rejected.reason
    page = await store.log.read(held.stream, held.position, held.bound)
    assert not page.expired
    return [event.seq for event in page.events]


async def test_an_event_past_the_ttl_whose_partition_stands_is_resumed_from(migrated: str) -> None:
    age(migrated)
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        for _ in range(3):
            await store.log.append(stream, NOTE)
        grow_old(migrated, stream.number, 2, 7 + 1 / 86400)
        await let_go(migrated)
        assert await resumed(store, key, stream, 1) == [2, 3]


async def test_a_call_that_outlasts_the_ttl_goes_on_and_says_what_has_expired(migrated: str) -> None:
    age(migrated)
    async with running(migrated, 2) as (store, other):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        for _ in range(3):
            await store.log.append(stream, NOTE)
        grow_old(migrated, stream.number, 3, 9)
        await let_go(migrated)
        assert await store.log.append(stream, NOTE) == 4
        assert await resumed(other, key, stream, 0) == "expired"
        assert await resumed(other, key, stream, 2) == "expired"
        assert await resumed(other, key, stream, 3) == [4], "nothing after it is missing"
        assert await resumed(other, key, stream, 9) == "unknown", "it was never given"
        assert await store.log.append(stream, RESULT, final=True) == 5
        assert await resumed(other, key, stream, 3) == [4, 5]


async def test_a_stream_that_ended_after_its_beginning_had_gone_says_so(migrated: str) -> None:
    age(migrated)
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        for _ in range(3):
            await store.log.append(stream, NOTE)
        await store.log.append(stream, RESULT, final=True)
        grow_old(migrated, stream.number, 2, 9)
        await let_go(migrated)
        assert await resumed(store, key, stream, 1) == "expired"
        assert await resumed(store, key, stream, 2) == [3, 4]
        assert await resumed(store, key, stream, 3) == [4]


@pytest.mark.parametrize("kind", ["own", "shared"])
async def test_a_quiet_stream_whose_events_all_went_goes_on_with_higher_numbers(migrated: str, kind: str) -> None:
    age(migrated)
    async with running(migrated, 2) as (store, other):
        key, opened = await open_session(store)
        stream = standalone(key, opened) if kind == "shared" else await open_call(store, key)
        for _ in range(3):
            await store.log.append(stream, NOTE)
        grow_old(migrated, stream.number, 3, 9)
        await let_go(migrated)
        assert query(migrated, "SELECT count(*) FROM events WHERE stream = %s", stream.number) == [(0,)]
        assert await resumed(other, key, stream, 3) == []
        assert await resumed(other, key, stream, 2) == "expired"
        if kind == "shared":
            assert await other.log.append(standalone(key, opened), NOTE) == 4
        else:
            # Its worker counts in memory; who ends it in its place does not.
            await parts(other).finisher.end_worker(store.worker_number(), "worker_lost")
        assert await resumed(other, key, stream, 3) == [4]


async def test_a_reader_that_lags_behind_a_dropped_partition_is_not_given_the_rest_in_silence(migrated: str) -> None:
    age(migrated)
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        going_on, ended = await open_call(store, key, 1), await open_call(store, key, 2)
        held = []
        for stream in (going_on, ended):
            for _ in range(3):
                await store.log.append(stream, NOTE)
            held.append(await store.log.attach(key, stream.number, 1, patience=5))
        await store.log.append(ended, RESULT, final=True)
        for stream in (going_on, ended):
            grow_old(migrated, stream.number, 4, 9)
        bounds = [each.bound - timedelta(days=9) for each in held]
        # Where a pass was killed before it removed the rows of ended streams, too.
        query(
            migrated,
            "SELECT raise_floors(inhrelid, now() - interval '7 days') FROM pg_inherits "
            "WHERE inhparent = 'events'::regclass AND inhrelid::regclass::text = %s",
            partitions(migrated)[3],
        )
        for name in partitions(migrated)[:5]:
            query(migrated, f"DROP TABLE mcp_events.{name}")  # type: ignore[arg-type]  # a name of ours
        for stream, bound in zip((going_on, ended), bounds, strict=True):
            page = await store.log.read(stream.number, 1, bound)
            assert (page.expired, list(page.events)) == (True, []), stream
        await let_go(migrated)
        page = await store.log.read(ended.number, 1, bounds[1])
        assert page.ended or page.expired


async def test_a_server_whose_job_never_ran_goes_on_after_forty_days(migrated: str) -> None:
    age(migrated, 40)
    drop_partitions_of_the_present = partitions(migrated)[-3:]
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        await store.log.append(stream, NOTE)
        for name in drop_partitions_of_the_present:
            query(migrated, f"DROP TABLE mcp_events.{name}")  # type: ignore[arg-type]  # a name of ours
        assert await store.log.append(stream, NOTE) == 2
        assert await resumed(store, key, stream, 1) == [2]
        assert len([o for o in (await let_go(migrated)).partitions if o.result == "dropped"]) == 33
        assert await store.log.append(stream, RESULT, final=True) == 3
        drop_partitions(migrated)


async def test_one_of_the_workers_lets_go_where_no_job_does(
    migrated: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(chores, "RETENTION_FIRST", 0.05)
    age(migrated, events=24)
    caplog.set_level("INFO")
    async with running(migrated, 3, retention=WEEK):
        await until(lambda: len(partitions(migrated)) == 10)
        await until(lambda: "Retention: events_p" in caplog.text)
    assert caplog.text.count("Retention: ") == 1
