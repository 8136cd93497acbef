"""Resuming a call's stream: from every point, on any worker, with the old connection still there."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.e2e.conftest import SharedWorkers, StartWorkers
from tests.support.mcp_http import Response, Session
from tests.support.resuming import ResumingCall, split_id
from tests.support.sse import Event
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["mcpserver_app", "fastmcp_app", "lowlevel_app"])
def module(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def collect(response: Response) -> list[Event]:
    """All events with data until the response ends, which it must do cleanly."""
    assert response.status == 200, await response.read()
    events = [event async for event in response.events() if event.data]
    assert response.complete
    return events


def indexes(events: list[Event]) -> list[int]:
    """What `count` said in each of its notifications; -1 is its result."""
    return [int(event.message["params"]["message"]) if "method" in event.message else -1 for event in events]


async def counted(session: Session, n: int = 10, seconds: float = 0.2) -> tuple[Event, list[Event]]:
    """The priming event and the others of a call that was read to its end."""
    response = await session.call("count", {"n": n, "seconds": seconds}, progress_token="t")
    events = [event async for event in response.events()]
    assert response.complete
    return events[0], events[1:]


async def test_a_call_has_a_priming_event_and_contiguous_ids(module: str, shared_workers: SharedWorkers) -> None:
    workers = await shared_workers(module)
    session = await Session.initialize(workers[0].url)
    priming, events = await counted(session)
    stream, seq = split_id(priming.id or "")
    assert (seq, priming.data) == (0, "")
    assert [event.id for event in events] == [f"{stream}-{number}" for number in range(1, 12)]
    assert indexes(events) == [*range(10), -1]
    workers.assert_clean_logs()


@pytest.mark.parametrize("seen", [0, 1, 7, 10])
async def test_a_finished_call_is_replayed_on_another_worker_from_any_id(
    module: str, seen: int, shared_workers: SharedWorkers
) -> None:
    workers = await shared_workers(module)
    session = await Session.initialize(workers[0].url)
    priming, events = await counted(session)
    last = ([priming, *events][seen]).id
    for worker in (workers[1], workers[0]):
        replayed = await collect(await session.get(last, base_url=worker.url))
        assert [(event.id, event.data) for event in replayed] == [(event.id, event.data) for event in events[seen:]]
    workers.assert_clean_logs()


async def test_resuming_after_the_final_response_tells_the_client_to_stop(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    _, events = await counted(session)
    for worker in workers.members:
        after = await session.get(events[-1].id, base_url=worker.url)
        assert (after.status, await after.read()) == (204, b"")
    workers.assert_clean_logs()


async def running_call(workers: Workers, session: Session, key: str) -> tuple[Response, Event]:
    """A `wait` call on the first worker that has sent its first notification; the response, and that event."""
    response = await session.call("wait", {"key": key}, progress_token="t")
    async for event in response.events():
        if event.data:
            await workers.wait_for(key)
            return response, event
    raise AssertionError("The call ended before it waited.")


async def test_what_happens_after_the_resume_arrives_live_on_another_worker(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    old, first = await running_call(workers, session, "k")
    old.cut()
    resumed = await session.get(first.id, base_url=workers[1].url)
    assert resumed.status == 200
    workers.release("k")
    events = await asyncio.wait_for(collect(resumed), 2)
    assert [event.message.get("method") for event in events] == ["notifications/progress", None]
    assert [split_id(event.id or "")[1] for event in events] == [2, 3]
    workers.assert_clean_logs()


@pytest.mark.parametrize("reader", [0, 1])
async def test_the_newest_reader_wins_and_the_older_one_ends_within_a_second(
    reader: int, shared_workers: SharedWorkers
) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    first, event = await running_call(workers, session, "k")
    second = await session.get(event.id, base_url=workers[1].url)
    assert await asyncio.wait_for(first.drain(), 1), "The first response was cut, not ended."
    third = await session.get(event.id, base_url=workers[reader].url)
    assert await asyncio.wait_for(second.drain(), 1), "The second response was cut, not ended."
    workers.release("k")
    events = await asyncio.wait_for(collect(third), 2)
    assert [split_id(event.id or "")[1] for event in events] == [2, 3]
    workers.assert_clean_logs()


async def test_a_client_that_reads_nothing_costs_only_itself(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    old, first = await running_call(workers, session, "k")
    stalled = await session.get(first.id, base_url=workers[0].url, receive_buffer=4096)
    stalled.abandon()
    old.close()
    big = await session.call("burst", {"n": 200, "size": 100_000}, progress_token="big")
    priming = await anext(aiter(big.events()))
    big.abandon()
    # The session goes on while twenty megabytes wait for a reader that does not read.
    assert await asyncio.wait_for(session.call_result("echo", {"text": "still here"}), 5) == "still here"
    events = await asyncio.wait_for(collect(await session.get(priming.id, base_url=workers[1].url)), 30)
    assert [split_id(event.id or "")[1] for event in events] == list(range(1, 202))
    workers.release("k")
    workers.assert_clean_logs()


async def test_one_call_cut_ten_times_over_three_workers(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 3)
    session = await Session.initialize(workers[0].url)
    arguments = {"n": 100, "seconds": 3}
    call = ResumingCall(session, workers.urls, random.Random(7), 100, arguments=arguments, cuts=10, off_owner=8)
    await call.run()
    call.assert_exactly_once()
    workers.assert_clean_logs()


async def test_a_tool_that_closes_its_stream_goes_on_and_is_resumed(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    response = await session.call("close_stream", {"n": 3}, progress_token="t")
    before = [event async for event in response.events()]
    assert response.complete
    assert all("result" not in (event.message or {}) for event in before)
    after = await collect(await session.get(before[-1].id, base_url=workers[1].url))
    assert indexes([event for event in before if event.data] + after) == [*range(6), -1]
    workers.assert_clean_logs()
