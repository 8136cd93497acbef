"""A database that goes away: calls wait for it and go on, requests are refused quickly (invariant 14)."""

from __future__ import annotations

import asyncio
import random
import signal
import time

import pytest

from tests.faults.conftest import StartServer, WorkersOn
from tests.support.calls import (
    DELETED,
    QUICKLY,
    Counting,
    assert_posts_refused,
    assert_refused,
    assert_serving,
    assert_sound,
    complaints,
    initialize,
)
from tests.support.mcp_http import Response, Session
from tests.support.postgres import PASSWORD
from tests.support.sdk_client import sdk_session
from tests.support.servers import Mode, resident_bytes
from tests.support.tcp_proxy import TcpProxy
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio

MEGABYTE = 1_000_000


async def warm(workers: Workers, session: Session) -> None:
    """Let every pool grow to its size, so that it is full of dead connections when the database goes."""
    async with asyncio.TaskGroup() as group:
        for worker in workers.members:
            for _ in range(10):
                group.create_task(session.call_result("echo", {"text": "warm"}, base_url=worker.url))


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_a_restart_in_mid_call_loses_and_doubles_nothing(
    mode: Mode, start_server: StartServer, workers_on: WorkersOn
) -> None:
    server = await start_server()
    workers = await workers_on(server.dsn)
    session = await Session.initialize(workers[0].url)
    await warm(workers, session)
    # With nobody at work the pools are full of dead connections afterwards. That is no client's affair.
    await server.restart(mode)
    for worker in workers.members:
        answers = await asyncio.gather(*(initialize(worker.url) for _ in range(4)))
        assert [answer.status for answer in answers] == [200] * 4
    calls = [await Counting.start(session, base_url=workers[n % 2].url) for n in range(6)]
    elsewhere = await Counting.start(session)
    await elsewhere.resumed(await session.get(elsewhere.cut(), base_url=workers[1].url))
    await server.restart(mode)
    for worker in workers.members:
        await assert_serving(session, worker.url)
    for call in (*calls, elsewhere):
        await call.finished()
    await assert_sound(server)
    for worker in workers.members:
        assert len(complaints(worker)) <= 20, "\n".join(complaints(worker))


@pytest.mark.slow
async def test_half_a_minute_without_a_database(start_server: StartServer, workers_on: WorkersOn) -> None:
    """The clients that were there lose nothing, those who come are told, and memory and the log stay small."""
    server = await start_server()
    workers = await workers_on(server.dsn, keep_alive=4)
    here, there = workers.members
    session = await Session.initialize(here.url)
    await warm(workers, session)
    flood = await session.call(
        "flood", {"key": "dry", "size": MEGABYTE // 10, "rate": 10 * MEGABYTE}, progress_token="f", base_url=there.url
    )
    await anext(flood.events())
    flood.close()
    attached = await Counting.start(session, seconds=3)
    remote = await Counting.start(session, seconds=3)
    await remote.resumed(await session.get(remote.cut(), base_url=there.url))
    lost = await Counting.start(session, seconds=3)
    async with (
        TcpProxy.to("127.0.0.1", there.port) as wire,
        sdk_session([f"http://127.0.0.1:{wire.port}"], random.Random(1)) as (client, sent),
    ):
        heard: list[str | None] = []
        progressed = asyncio.Event()

        async def progress(done: float, total: float | None, message: str | None) -> None:
            heard.append(message)
            progressed.set()

        sdk_call = asyncio.create_task(client.call_tool("count", {"n": 100, "seconds": 3}, progress_callback=progress))
        await asyncio.wait_for(progressed.wait(), 10)
        await server.stop("immediate")
        stopped = time.monotonic()
        before = [resident_bytes(worker.pid) for worker in workers.members]

        deleting = asyncio.create_task(assert_refused("DELETE", session.delete(base_url=there.url), DELETED))
        returning: asyncio.Task[Response] | None = None
        refusals = 0
        while (passed := time.monotonic() - stopped) < 27:
            if returning is None and passed > 8:
                # Both come back while there is no database, and are held rather than refused.
                wire.cut()
                returning = asyncio.create_task(session.get(lost.cut(), base_url=there.url))
            async with asyncio.TaskGroup() as group:
                for worker in workers.members:
                    group.create_task(assert_posts_refused(session, worker.url))
            refusals += 8
        await deleting
        after = [resident_bytes(worker.pid) for worker in workers.members]
        # 270 MB were to be sent meanwhile. What is kept is what each sender waits with.
        assert max(now - then for now, then in zip(after, before, strict=True)) < 40 * MEGABYTE, (before, after)
        await asyncio.sleep(stopped + 30 - time.monotonic())
        assert returning is not None and not returning.done()
        await server.start()
        workers.release("dry")

        await lost.resumed(await asyncio.wait_for(returning, 5))
        result = await asyncio.wait_for(sdk_call, 10)
        assert not result.is_error and heard == [str(n) for n in range(100)]
        # The call and the standalone stream, each once: the client gives up after a second refusal.
        assert sum(request.method == "GET" and request.last_event_id is not None for request in sent.sent) == 2
    for call in (attached, remote, lost):
        await call.finished()
    for call in (attached, remote):
        assert call.keep_alives >= 5
    for worker in workers.members:
        await assert_serving(session, worker.url)
        said = complaints(worker)
        assert len(said) <= 12, f"{refusals} requests were refused, and this is what the log says:\n" + "\n".join(said)
    await assert_sound(server)


async def test_an_outage_that_outlasts_the_bound_ends_the_calls_with_an_error(
    start_server: StartServer, workers_on: WorkersOn
) -> None:
    server = await start_server()
    workers = await workers_on(server.dsn, outage_timeout=2)
    here, there = workers.members
    session = await Session.initialize(here.url)
    call = await Counting.start(session, n=1000, seconds=60)
    cancelled = await session.call("note_cancellation", {"key": "given-up"})
    await workers.wait_for("given-up")
    await server.stop("fast")
    stopped = time.monotonic()
    # Who is attached is sent away, with a cursor; who comes back is held for as long as calls are, then refused.
    held = asyncio.create_task(session.get(call.cursor, base_url=there.url))
    await call.ended(8)
    assert await asyncio.wait_for(cancelled.drain(), 8)
    assert time.monotonic() - stopped < 2 + QUICKLY
    assert "result" not in call.events[-1].message
    async with asyncio.timeout(5):
        while not (workers.directory / "given-up.cancelled").exists():  # noqa: ASYNC110 (made by another process)
            await asyncio.sleep(0.01)
    assert (await held).status == 503
    assert 1.5 < time.monotonic() - stopped < 2 + QUICKLY
    await server.start()
    final: Response | None = None
    async with asyncio.timeout(10):
        while final is None or final.status != 200:
            final = await session.get(call.cursor, base_url=there.url)
    message = (await final.messages())[-1]
    assert message["error"]["data"] == {"reason": "outage"}, message
    assert "database" in message["error"]["message"]
    # The one that gave up goes on under a new number. The other had nothing to give up.
    await assert_serving(session, here.url)
    await assert_serving(session, there.url)
    rows = await server.execute("SELECT ended_reason, count(*)::int FROM mcp_events.workers GROUP BY 1 ORDER BY 1")
    assert rows == [("outage", 1), (None, 2)]
    await assert_sound(server)


async def test_a_worker_that_drains_without_a_database_lets_held_requests_go(
    start_server: StartServer, workers_on: WorkersOn
) -> None:
    server = await start_server()
    workers = await workers_on(server.dsn)
    session = await Session.initialize(workers[0].url)
    call = await Counting.start(session, n=1000, seconds=60)
    await server.stop("fast")
    held = asyncio.create_task(assert_refused("A held GET", session.get(call.cursor, base_url=workers[1].url), 10))
    # Longer than anything but a GET waits.
    await assert_posts_refused(session, workers[1].url)
    assert not held.done()
    for worker in workers.members:
        worker.signal(signal.SIGTERM)
    await asyncio.wait_for(held, 3)
    await call.ended(3)
    async with asyncio.timeout(15):
        await asyncio.gather(*(worker.process.wait() for worker in workers.members))
    assert "Traceback" not in workers[0].output() + workers[1].output()


async def test_a_worker_that_starts_without_a_database_says_so(
    start_server: StartServer, workers_on: WorkersOn
) -> None:
    server = await start_server()
    await server.stop("fast")
    with pytest.raises(AssertionError, match="did not start") as failure:
        await workers_on(server.dsn, 1)
    assert "PostgreSQL cannot be used" in str(failure.value)
    assert PASSWORD not in str(failure.value)
