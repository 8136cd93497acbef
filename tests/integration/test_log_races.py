"""Who ends a stream when several would (invariants 1, 8 and 12): its worker, a DELETE elsewhere, a reaper."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any

import pytest

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import SessionKey, SessionUnknown, Stream
from mcp_pg_events.errors import AppendRefused, DatabaseUnavailable, Error
from mcp_pg_events.finish import Suspect
from tests.support.log import (
    NOTE,
    RESULT,
    assert_no_deadlocks,
    assert_streams_are_whole,
    open_call,
    open_session,
    parts,
    query,
    running,
    standalone,
    stored,
)

pytestmark = pytest.mark.anyio


async def write_until_refused(store: PostgresStore, stream: Stream, acknowledged: set[tuple[int, int]]) -> None:
    """Append until somebody ends the stream, noting what was acknowledged."""
    with contextlib.suppress(Error):
        while True:
            acknowledged.add((stream.number, await store.log.append(stream, NOTE)))


async def finish_soon(store: PostgresStore, stream: Stream, acknowledged: set[tuple[int, int]]) -> None:
    """A few events, and then the result: the final that races with somebody else's."""
    with contextlib.suppress(Error):
        for final in (False, False, True):
            acknowledged.add((stream.number, await store.log.append(stream, RESULT if final else NOTE, final=final)))


def assert_acknowledged_is_stored(dsn: str, acknowledged: set[tuple[int, int]]) -> None:
    assert acknowledged
    assert acknowledged <= {tuple(row) for row in query(dsn, "SELECT stream, seq FROM events")}


async def test_a_session_that_ends_elsewhere_races_with_appends(migrated: str) -> None:
    acknowledged: set[tuple[int, int]] = set()
    async with running(migrated, 2) as (here, there):
        lasting_key, _ = await open_session(here)
        lasting = await open_call(here, lasting_key)
        others = asyncio.create_task(write_until_refused(here, lasting, acknowledged))

        async def race(seed: int) -> None:
            key, opened = await open_session(here)
            streams = [await open_call(here, key, number) for number in range(1, 4)]
            work = [
                asyncio.create_task(write_until_refused(here, streams[0], acknowledged)),
                asyncio.create_task(write_until_refused(there, standalone(key, opened), acknowledged)),
                *(asyncio.create_task(finish_soon(here, stream, acknowledged)) for stream in streams[1:]),
            ]
            await asyncio.sleep(random.Random(seed).uniform(0, 0.006))
            await there.log.end_session(key, "deleted")
            await asyncio.wait_for(asyncio.gather(*work), 10)

        for start in range(0, 150, 10):
            await asyncio.gather(*(race(seed) for seed in range(start, start + 10)))
        # Other sessions of the same worker are none the wiser.
        assert not others.done()
        assert not lasting.closed
        await here.log.append(lasting, RESULT, final=True)
        await others
    assert_streams_are_whole(migrated)
    assert_acknowledged_is_stored(migrated, acknowledged)
    assert_no_deadlocks(migrated)
    assert query(migrated, "SELECT count(*) FROM streams WHERE final_seq IS NULL AND request_key IS NOT NULL") == [(0,)]


async def renewed(store: PostgresStore, old: int) -> None:
    """Return when a worker that was declared dead has taken its new number and left nothing open under the old one."""
    worker = parts(store)
    if worker.identity.number == old:
        worker.writer.declared_dead()
    assert worker._renewal is not None
    await asyncio.wait_for(asyncio.shield(worker._renewal), 10)
    assert worker.identity.number != old


async def test_a_worker_that_is_declared_dead_races_with_its_appends(migrated: str) -> None:
    acknowledged: set[tuple[int, int]] = set()
    async with running(migrated, 3) as (watcher, *victims):
        key, opened = await open_session(watcher)

        async def race(victim: PostgresStore, seed: int) -> None:
            number = victim.worker_number()
            first = seed * 10
            streams = [await open_call(victim, key, first + place) for place in range(4)]
            work = [
                asyncio.create_task(write_until_refused(victim, streams[0], acknowledged)),
                asyncio.create_task(write_until_refused(victim, standalone(key, opened), acknowledged)),
                *(asyncio.create_task(finish_soon(victim, stream, acknowledged)) for stream in streams[1:]),
            ]
            await asyncio.sleep(random.Random(seed).uniform(0, 0.004))
            reaped: list[bool] = []
            # A stamp that comes between a reaper's start and its lock makes the victim look alive to that reaper.
            while not any(reaped):
                reap = parts(watcher).finisher.end_worker
                reaped = await asyncio.gather(*(reap(number, "worker_lost") for _ in range(2)))
            assert sorted(reaped) == [False, True], "two reapers at once"
            await asyncio.wait_for(asyncio.gather(*work), 10)
            await renewed(victim, number)

        for seed in range(0, 100, 2):
            await asyncio.gather(*(race(victim, seed + place) for place, victim in enumerate(victims)))
    assert_streams_are_whole(migrated)
    assert_acknowledged_is_stored(migrated, acknowledged)
    assert_no_deadlocks(migrated)
    assert query(migrated, "SELECT count(*) FROM streams WHERE final_seq IS NULL AND request_key IS NOT NULL") == [(0,)]


async def open_and_use(
    store: PostgresStore, key: SessionKey, number: int, acknowledged: set[tuple[int, int]]
) -> int | None:
    """A request that arrives, and a handler that sends until it is refused; its stream, None where it was refused."""
    try:
        stream = await open_call(store, key, number)
    except (SessionUnknown, DatabaseUnavailable):
        return None
    ended = asyncio.Event()
    stream.on_ended = ended.set
    await asyncio.wait_for(write_until_refused(store, stream, acknowledged), 10)
    # Nobody else tells the handler, and it might have nothing to send for long.
    assert stream.ended and (ended.is_set() or parts(store).writer.lost)
    return stream.number


def assert_nothing_is_left_open(dsn: str) -> None:
    """No open stream in a session that ended, and none of a worker that ended: nobody would ever end it."""
    statement = """
        SELECT t.number, s.ended_reason, w.ended_reason
          FROM streams t JOIN sessions s ON s.id = t.session_id LEFT JOIN workers w ON w.number = t.worker
         WHERE t.final_seq IS NULL AND (s.ended_at IS NOT NULL OR w.ended_at IS NOT NULL)
    """
    assert query(dsn, statement) == []


async def test_a_session_that_ends_races_with_requests_that_arrive(migrated: str) -> None:
    acknowledged: set[tuple[int, int]] = set()
    outcomes: list[int | None] = []
    async with running(migrated, 2) as (here, there):

        async def race(seed: int) -> None:
            key, _ = await open_session(here)
            rng = random.Random(seed)

            async def request(store: PostgresStore, number: int, wait: float) -> int | None:
                await asyncio.sleep(wait)
                return await open_and_use(store, key, number, acknowledged)

            async def end(wait: float) -> None:
                await asyncio.sleep(wait)
                await there.log.end_session(key, "deleted")

            requests = [request((here, there)[n % 2], n, rng.uniform(0, 0.005)) for n in range(1, 5)]
            *found, _ = await asyncio.gather(*requests, end(rng.uniform(0, 0.005)))
            outcomes.extend(found)

        for start in range(0, 90, 6):
            await asyncio.gather(*(race(seed) for seed in range(start, start + 6)))
    assert None in outcomes and any(outcomes), "they never met"
    assert_nothing_is_left_open(migrated)
    assert_streams_are_whole(migrated)
    assert_acknowledged_is_stored(migrated, acknowledged)
    assert_no_deadlocks(migrated)


async def test_a_worker_that_is_declared_dead_races_with_requests_that_arrive(migrated: str) -> None:
    acknowledged: set[tuple[int, int]] = set()
    outcomes: list[int | None] = []
    async with running(migrated, 3) as (watcher, *victims):
        key, _ = await open_session(watcher)

        async def race(victim: PostgresStore, seed: int) -> None:
            old = victim.worker_number()
            rng = random.Random(seed)

            async def request(number: int, wait: float) -> int | None:
                await asyncio.sleep(wait)
                return await open_and_use(victim, key, number, acknowledged)

            requests = [asyncio.create_task(request(10 * seed + n, rng.uniform(0, 0.005))) for n in range(1, 5)]
            await asyncio.sleep(rng.uniform(0, 0.005))
            while not await parts(watcher).finisher.end_worker(old, "worker_lost"):
                pass
            await renewed(victim, old)
            # Requests that came after its renewal belong to its new number, and end with it.
            while not all(request.done() for request in requests):
                await parts(victim).finisher.finish_own(parts(victim).writer.calls.numbers(), "shutdown")
            outcomes.extend(await asyncio.gather(*requests))

        for seed in range(0, 60, 2):
            await asyncio.gather(*(race(victim, seed + place) for place, victim in enumerate(victims)))
    assert None in outcomes and any(outcomes), "they never met"
    assert_nothing_is_left_open(migrated)
    assert_streams_are_whole(migrated)
    assert_acknowledged_is_stored(migrated, acknowledged)
    assert_no_deadlocks(migrated)


async def test_a_stream_that_was_ended_before_its_worker_heard_of_it_takes_nothing(migrated: str) -> None:
    """Opened, ended by a DELETE elsewhere, and only then known here, where the fence has been renewed meanwhile."""
    async with running(migrated, 2) as (here, there):
        key, _ = await open_session(here)
        other_key, _ = await open_session(here)
        other = await open_call(here, other_key)
        opened, go_on = asyncio.Event(), asyncio.Event()
        open_ = parts(here).opener.open

        async def slow_open(*asked: Any) -> Any:
            answer = await open_(*asked)
            opened.set()
            await go_on.wait()
            return answer

        parts(here).opener.open = slow_open  # type: ignore[method-assign]
        opening = asyncio.create_task(open_call(here, key))
        await opened.wait()
        await there.log.end_session(key, "deleted")
        await here.log.append(other, NOTE)
        go_on.set()
        stream = await opening
        ended = asyncio.Event()
        stream.on_ended = ended.set
        with pytest.raises(AppendRefused):
            await here.log.append(stream, NOTE)
        assert ended.is_set()
        assert len(stored(migrated, stream.number)) == 1
        await here.log.append(other, NOTE)
    assert_streams_are_whole(migrated)


async def test_a_store_that_closes_leaves_no_call_without_an_end(migrated: str) -> None:
    async with PostgresStore(migrated) as other:
        async with PostgresStore(migrated) as store:
            key, _ = await open_session(store)
            stream = await open_call(store, key)
            await store.log.append(stream, NOTE)
        assert_nothing_is_left_open(migrated)
        await open_call(other, key)
    assert_streams_are_whole(migrated)


async def test_reaping_twice_changes_nothing(migrated: str) -> None:
    async with running(migrated, 2) as (watcher, victim):
        key, _ = await open_session(watcher)
        stream = await open_call(victim, key)
        await victim.log.append(stream, NOTE)
        number = victim.worker_number()
        assert await parts(watcher).finisher.end_worker(number, "worker_lost")
        before = stored(migrated, stream.number)
        assert json.loads(before[-1][1]) == {
            "jsonrpc": "2.0",
            "id": 1,
            "error": {
                "code": -32000,
                "message": "The worker running this request is gone",
                "data": {"reason": "worker_lost"},
            },
        }
        assert not await parts(watcher).finisher.end_worker(number, "worker_lost")
        assert stored(migrated, stream.number) == before
        await renewed(victim, number)


async def test_a_worker_that_lives_is_not_reaped(migrated: str) -> None:
    async with running(migrated, 2) as (watcher, other):
        finisher, number = parts(watcher).finisher, other.worker_number()
        assert await finisher.suspects(60) == []
        ((seen_at,),) = query(migrated, "SELECT seen_at FROM workers WHERE number = %s", number)
        assert not await finisher.reap(Suspect(number, seen_at, False))


async def test_a_worker_that_stops_while_it_takes_a_new_number_leaves_none_open(migrated: str) -> None:
    for turn in range(12):
        async with PostgresStore(migrated) as store:
            key, _ = await open_session(store)
            await open_call(store, key)
            parts(store).writer.declared_dead()
            await asyncio.sleep(turn / 500)
        assert query(migrated, "SELECT number FROM workers WHERE ended_at IS NULL") == [], turn
        assert query(migrated, "SELECT count(*) FROM streams WHERE worker IS NOT NULL AND final_seq IS NULL") == [(0,)]
