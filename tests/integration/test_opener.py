"""Streams opened together: each request gets its own answer, whatever the others meet (invariants 9 and 10)."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from mcp_pg_events.backend import RequestInFlight, SessionKey, SessionUnknown, Stream
from tests.support.log import (
    RESULT,
    assert_no_deadlocks,
    assert_streams_are_whole,
    open_call,
    open_session,
    parts,
    query,
    running,
    until,
)

pytestmark = pytest.mark.anyio


def stop_single_opens(store: Any) -> None:
    """From now on every stream is opened with others, or the test fails."""
    fetch = parts(store).database.fetch

    async def no_single_open(statement: bytes, *arguments: Any, **options: Any) -> Any:
        assert b":open_stream " not in statement, "a request had to be opened by itself"
        return await fetch(statement, *arguments, **options)

    parts(store).database.fetch = no_single_open  # type: ignore[method-assign, assignment]


async def test_requests_that_come_together_share_a_statement(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        owned, _ = await open_session(store, owner='"alice"')
        stop_single_opens(store)
        statements = count_statements(parts(store).opener)
        streams = await asyncio.gather(
            *(open_call(store, asked, number) for number in range(1, 21) for asked in (key, owned))
        )
        assert len({stream.number for stream in streams}) == 40
        assert len(statements) == 2, "the first alone, and then all the others"
        of = dict(query(migrated, "SELECT number, session_id || request_key FROM streams WHERE method = 'tools/call'"))
        assert of == {stream.number: f"{stream.session_id}{stream.request_key}" for stream in streams}
        await asyncio.gather(*(store.log.append(stream, RESULT, final=True) for stream in streams))
    assert_streams_are_whole(migrated)


async def test_requests_whose_work_is_elsewhere_are_opened_in_turns(migrated: str) -> None:
    """So that the other process has something to do before all are open."""
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        statements = count_statements(parts(store).opener)
        calls = await asyncio.gather(
            *(
                store.log.open_stream(
                    key, request_id=f"{n}", request_key=f"i{n}", method="x", restore=False, elsewhere=True
                )
                for n in range(1, 42)
            )
        )
        assert len({call.stream.number for call in calls}) == 41
        assert statements == [1, 10, 7, 5, 4, 4, 4, 4, 2]


def count_statements(opener: Any) -> list[int]:
    """The sizes of the batches to come."""
    batches: list[int] = []
    open_batch = opener._open

    async def counted(batch: list[Any]) -> None:
        batches.append(len(batch))
        await open_batch(batch)

    opener._open = counted
    return batches


async def test_each_of_a_batch_gets_its_own_answer(migrated: str) -> None:
    async with running(migrated, 2) as (here, there):
        key, _ = await open_session(here)
        owned, _ = await open_session(here, owner='"alice"')
        ended, _ = await open_session(here)
        await here.log.end_session(ended, "deleted")
        await open_call(there, key, 5)
        asked = [
            (key, 1),
            (SessionKey(owned.session_id, owned.server, '"mallory"', None), 2),
            (SessionKey(owned.session_id, owned.server, None, None), 3),
            (SessionKey(owned.session_id, "another server", '"alice"', None), 4),
            (key, 5),
            (key, 1),
            (ended, 6),
            (SessionKey("unknown", key.server, None, None), 7),
            (owned, 1),
        ]
        got = await asyncio.gather(*(open_call(here, *one) for one in asked), return_exceptions=True)
        assert [Stream if isinstance(one, Stream) else type(one) for one in got] == [
            Stream,
            *[SessionUnknown] * 3,
            *[RequestInFlight] * 2,
            *[SessionUnknown] * 2,
            Stream,
        ]


async def test_a_session_that_is_locked_holds_up_no_other(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        locked, _ = await open_session(store)
        with psycopg.connect(migrated) as deleting:
            deleting.execute("SELECT FROM mcp_events.sessions WHERE id = %s FOR UPDATE", [locked.session_id])
            first = asyncio.create_task(open_call(store, key, 1))
            waiting = asyncio.create_task(open_call(store, locked, 1))
            others = asyncio.create_task(open_call(store, key, 2))
            async with asyncio.timeout(1):
                await asyncio.gather(first, others)
            assert not waiting.done()
        assert (await waiting).session_id == locked.session_id


async def test_a_lost_connection_costs_no_request_and_opens_none_twice(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        opener = parts(store).opener
        connection = opener._kept.connection
        assert connection is not None
        execute = connection.execute

        async def committed_and_then_cut(statement: bytes, parameters: Any) -> Any:
            await execute(statement, parameters)
            raise psycopg.OperationalError("the connection was lost")

        connection.execute = committed_and_then_cut  # type: ignore[method-assign, assignment]
        streams = await asyncio.gather(*(open_call(store, key, number) for number in range(1, 9)))
        assert len({stream.number for stream in streams}) == 8
        assert query(migrated, "SELECT count(*) FROM streams WHERE method = 'tools/call'") == [(8,)]
        await until(lambda: opener._kept.connection is not None)
        stop_single_opens(store)
        await open_call(store, key, 9)


async def test_a_request_that_is_cancelled_takes_no_other_with_it(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        first, *others = [asyncio.create_task(open_call(store, key, number)) for number in range(1, 6)]
        await asyncio.sleep(0)
        first.cancel()
        assert len({(await other).number for other in others}) == 4


async def test_a_request_renews_its_session_s_stamp(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        query(migrated, "UPDATE sessions SET seen_at = now() - interval '1 hour'")
        stop_single_opens(store)
        await open_call(store, key)
        await until(lambda: query(migrated, "SELECT id FROM sessions WHERE seen_at > now() - interval '1 minute'"))


async def test_workers_that_are_sent_the_same_requests_and_deletes_never_deadlock(migrated: str) -> None:
    async with running(migrated, 2) as stores:
        sessions = [(await open_session(stores[0]))[0] for _ in range(12)]

        async def flood(store: Any, order: int) -> int:
            asked = [(key, number) for key in sessions[::order] for number in range(1, 6)][::order]
            got = await asyncio.gather(*(open_call(store, *one) for one in asked), return_exceptions=True)
            assert {type(one) for one in got} <= {Stream, RequestInFlight, SessionUnknown}
            return sum(isinstance(one, Stream) for one in got)

        async def delete() -> None:
            for key in sessions[::4]:
                await stores[1].log.end_session(key, "deleted")

        opened = await asyncio.gather(flood(stores[0], 1), flood(stores[1], -1), delete())
        assert opened[0] + opened[1] == len(query(migrated, "SELECT number FROM streams WHERE method = 'tools/call'"))
    assert_no_deadlocks(migrated)
