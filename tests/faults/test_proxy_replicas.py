"""A replica of the HTTP proxy dies, freezes or drains in the middle of a call."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.faults.test_death import trusted
from tests.support.deployments import rows_of
from tests.support.mcp_http import Response, Session, close_all
from tests.support.sse import Event
from tests.support.until import until
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio

N = 60
ARGUMENTS = {"n": N, "seconds": 4.0}


@asynccontextmanager
async def proxied(
    dsn: str, upstream_dsn: str | None, linger: float | None = None, **options: object
) -> AsyncIterator[tuple[Workers, Workers]]:
    given = {"proxy": options} | ({"linger": linger} if linger else {})
    async with run_workers("mcpserver_app", upstream_dsn, 1) as upstream:
        environment = {"TEST_UPSTREAM": f"{upstream[0].url}/mcp"}
        async with run_workers("proxied_app", dsn, 2, environment=environment, options=given) as replicas:
            try:
                yield replicas, upstream
            finally:
                close_all()


async def some(response: Response, count: int) -> list[Event]:
    events: list[Event] = []
    async for event in response.events():
        events.append(event)
        if sum(bool(event.data) for event in events) >= count:
            break
    return events


async def rest(response: Response) -> list[Event]:
    assert response.status == 200, await response.read()
    async with asyncio.timeout(30):
        return [event async for event in response.events()]


def assert_whole(events: list[Event]) -> None:
    messages = [event.message for event in events if event.data]
    assert [int(message["params"]["message"]) for message in messages[:-1]] == list(range(N))
    assert messages[-1]["result"]["content"][0]["text"] == f"counted {N}"


@pytest.mark.parametrize("how", ["killed", pytest.param("frozen", marks=pytest.mark.slow), "drained"])
async def test_a_living_replica_goes_on_where_another_stopped(how: str, migrated: str, other: str) -> None:
    async with proxied(migrated, other, unresponsive_timeout=15.0) as (replicas, _):
        await trusted(replicas, migrated)
        session = await Session.initialize(replicas[0].url)
        await session.call_result("echo", {"text": "x"}, base_url=replicas[1].url)
        response = await session.call("count", ARGUMENTS, progress_token="t", base_url=replicas[0].url)
        events = await some(response, 10)
        match how:
            case "killed":
                await replicas[0].kill()
            case "frozen":
                replicas[0].pause()
            case "drained":
                replicas[0].signal(signal.SIGTERM)
                events += await rest(response)
        response.cut()
        again = await session.get(events[-1].id, base_url=replicas[1].url)
        events += await rest(again)
        assert_whole(events)
        if how == "frozen":
            replicas[0].resume()

            async def served_again() -> bool:
                return (await session.call("echo", {"text": "back"}, base_url=replicas[0].url)).status == 200

            await until(served_again)


@pytest.mark.parametrize("how", ["killed", "drained"])
async def test_a_call_that_has_brought_no_event_is_gone_on_with_too(how: str, migrated: str, other: str) -> None:
    """Of the upstream there is the id that its response begins with, and nothing else."""
    async with proxied(migrated, other) as (replicas, upstream):
        await trusted(replicas, migrated)
        session = await Session.initialize(replicas[0].url)
        await session.call_result("echo", {"text": "x"}, base_url=replicas[1].url)
        response = await session.call("wait", {"key": "k"}, base_url=replicas[0].url)
        cursor = (await anext(response.events())).id
        if how == "killed":
            await replicas[0].kill()
        else:
            replicas[0].signal(signal.SIGTERM)
            await rest(response)
        again = await session.get(cursor, base_url=replicas[1].url)
        upstream.release("k")
        assert "result" in (await rest(again))[-1].message


async def test_a_stranger_who_names_a_stream_does_not_take_its_clients_place(migrated: str, other: str) -> None:
    async with proxied(migrated, other) as (replicas, _):
        await trusted(replicas, migrated)
        session = await Session.initialize(replicas[0].url)
        stranger = await Session.initialize(replicas[1].url)
        response = await session.call("count", ARGUMENTS, progress_token="t", base_url=replicas[0].url)
        events = await some(response, 5)
        response.cut()
        waiting = await session.get(events[-1].id, base_url=replicas[1].url)
        events += await some(waiting, 1)
        assert (await stranger.get(events[0].id, base_url=replicas[1].url)).status == 400
        await replicas[0].kill()
        assert_whole(events + await rest(waiting))


async def test_a_call_that_the_upstream_cannot_resume_ends_with_an_error_at_once(migrated: str) -> None:
    async with proxied(migrated, None) as (replicas, _):
        await trusted(replicas, migrated)
        session = await Session.initialize(replicas[0].url)
        await session.call_result("echo", {"text": "x"}, base_url=replicas[1].url)
        response = await session.call("count", ARGUMENTS, progress_token="t", base_url=replicas[0].url)
        events = await some(response, 10)
        await replicas[0].kill()
        began = time.monotonic()
        final = (await rest(await session.get(events[-1].id, base_url=replicas[1].url)))[-1].message
        assert time.monotonic() - began < 3
        assert final["error"]["data"] == {"reason": "upstream_lost"}


async def test_the_standalone_stream_is_taken_over_too(migrated: str, other: str) -> None:
    async with proxied(migrated, other) as (replicas, _):
        session = await Session.initialize(replicas[0].url)
        listening = await session.get(base_url=replicas[0].url)
        assert await session.call_result("announce", {"n": 2}, base_url=replicas[1].url) == "announced 2"
        last = (await some(listening, 2))[-1].id
        await replicas[0].kill()
        assert await session.call_result("announce", {"n": 2}, base_url=replicas[1].url) == "announced 2"
        again = await session.get(last, base_url=replicas[1].url)
        indexes = [event.message["params"]["data"]["index"] for event in await some(again, 2) if event.data]
        assert indexes == [0, 1]


async def test_the_standalone_stream_is_read_only_while_a_client_listens(migrated: str) -> None:
    reading = "SELECT worker IS NOT NULL FROM mcp_events.streams WHERE request_key IS NULL"
    async with proxied(migrated, None, linger=0.2) as (replicas, _):
        session = await Session.initialize(replicas[0].url)
        listening = await session.get(base_url=replicas[0].url)
        elsewhere = await session.get(base_url=replicas[1].url)
        assert await session.call_result("announce", {"n": 2}) == "announced 2"
        last = (await some(elsewhere, 2))[-1].id
        assert await rows_of(migrated, reading) == [(True,)]
        listening.cut()
        elsewhere.cut()

        async def left() -> bool:
            return await rows_of(migrated, reading) == [(False,)]

        await until(left)
        again = await session.get(last, base_url=replicas[1].url)
        assert await session.call_result("announce", {"n": 1}) == "announced 1"
        assert [event.message["params"]["data"]["index"] for event in await some(again, 1) if event.data] == [0]
        assert await rows_of(migrated, reading) == [(True,)]


@pytest.mark.parametrize("deletes", [0, 1], ids=["here", "elsewhere"])
async def test_a_replica_that_stops_waits_for_no_session_that_has_ended(migrated: str, deletes: int) -> None:
    """Every client of the SDK opens the standalone stream and ends with DELETE."""
    async with proxied(migrated, None) as (replicas, _):
        sessions = [await Session.initialize(replicas[0].url) for _ in range(3)]
        for session in sessions:
            assert (await session.get(base_url=replicas[0].url)).status == 200
            assert (await session.delete(base_url=replicas[deletes].url)).status == 200
        assert await replicas[0].stop(timeout=8) != -signal.SIGKILL, "it waited for too long"
