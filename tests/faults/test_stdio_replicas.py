"""Replicas of the proxy that die, drain or are full, with the programs that run on them."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.e2e.conftest import StartWorkers
from tests.faults.test_death import rows, trusted
from tests.support.mcp_http import Session, request
from tests.support.processes import gone, made
from tests.support.programs import HEADERS, INITIALIZE, cursor_of, pid_of, program, reason_of, waiting_call
from tests.support.servers import resident_bytes
from tests.support.until import until

pytestmark = pytest.mark.anyio


async def test_a_killed_replica_ends_its_sessions_and_leaves_no_program(
    migrated: str, start_workers: StartWorkers
) -> None:
    workers = await start_workers("stdio_app", 2, options=program("stubborn"))
    session = await Session.initialize(workers[0].url)
    pids = [await pid_of(session), int(await session.call_result("child"))]
    carried = await waiting_call(workers, session, "carried", base_url=workers[1].url)
    standalone = await session.get(base_url=workers[1].url)
    local = await waiting_call(workers, session, "local")
    cursor = await cursor_of(local)
    await trusted(workers, migrated)
    await workers[0].kill()
    assert await reason_of(carried) == "worker_lost"
    assert await reason_of(await session.get(cursor, base_url=workers[1].url)) == "worker_lost"
    async with asyncio.timeout(10):
        assert [event async for event in standalone.events() if event.data] == []
    assert standalone.complete
    there = workers[1].url
    assert (await session.call("echo", {"text": "x"}, base_url=there)).status == 404
    assert await session.notify("notifications/1", base_url=there) == 404
    await until(lambda: gone(*pids), timeout=10)
    again = await Session.initialize(there)
    assert await again.call_result("echo", {"text": "on"}) == "on"


async def test_a_replica_that_is_declared_dead_ends_its_programs_and_serves_on(
    migrated: str, start_workers: StartWorkers
) -> None:
    workers = await start_workers("stdio_app", 1, options=program())
    session = await Session.initialize(workers[0].url)
    pid = await pid_of(session)
    running = await waiting_call(workers, session, "k")
    await rows(
        migrated,
        "UPDATE mcp_events.workers SET ended_at = now(), ended_reason = 'test', epoch = epoch + 1 RETURNING number",
    )
    await until(lambda: gone(pid))
    running.cut()
    assert (await session.call("echo", {"text": "x"})).status in (404, 503)
    await until(lambda: rows(migrated, "SELECT FROM mcp_events.workers WHERE ended_at IS NULL"))
    again = await Session.initialize(workers[0].url)
    assert await again.call_result("echo", {"text": "on"}) == "on"


async def test_a_drained_replica_lets_calls_finish_and_ends_idle_sessions_at_once(
    start_workers: StartWorkers,
) -> None:
    workers = await start_workers("stdio_app", 2, options=program())
    idle, busy = await Session.initialize(workers[0].url), await Session.initialize(workers[0].url)
    pids = [await pid_of(idle), await pid_of(busy)]
    left = await waiting_call(workers, busy, "k")
    cursor = await cursor_of(left)
    there = workers[1].url
    workers[0].signal(signal.SIGTERM)
    await until(lambda: gone(pids[0]))
    assert (await idle.call("echo", {"text": "x"}, base_url=there)).status == 404
    resumed = await busy.get(cursor, base_url=there)
    assert await busy.call_result("echo", {"text": "while it drains"}, base_url=there) == "while it drains"
    workers.release("k")
    assert (await resumed.result())["result"]["content"][0]["text"] == "waited for k"
    async with asyncio.timeout(10):
        await workers[0].process.wait()
    assert await gone(*pids)
    assert await made(workers.directory / f"{pids[1]}.left")
    assert (await busy.call("echo", {"text": "x"}, base_url=there)).status == 404
    workers.assert_clean_logs()


async def test_what_does_not_finish_while_its_replica_drains_ends_with_an_error(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 2, options=program(drain_timeout=1.0))
    session = await Session.initialize(workers[0].url)
    pid = await pid_of(session)
    there = workers[1].url
    running = await waiting_call(workers, session, "never", base_url=there)
    workers[0].signal(signal.SIGTERM)
    assert await reason_of(running) == "shutdown"
    await until(lambda: gone(pid))
    assert (await session.call("echo", {"text": "x"}, base_url=there)).status == 404


async def test_programs_are_as_many_as_their_cap(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 2, options=program(max_processes=2))
    sessions = [await Session.initialize(workers[0].url) for _ in range(2)]
    response = await request("POST", workers[0].url + "/mcp", headers=HEADERS, body=INITIALIZE)
    assert response.status == 503
    assert (await response.json())["error"]["message"] == "Too many open sessions"
    elsewhere = await Session.initialize(workers[1].url)
    assert await elsewhere.call_result("echo", {"text": "there"}, base_url=workers[0].url) == "there"
    pid = await pid_of(sessions[0])
    assert (await sessions[0].delete(base_url=workers[1].url)).status == 200
    await until(lambda: gone(pid))
    await until(lambda: _opens(workers[0].url))


async def _opens(url: str) -> bool:
    response = await request("POST", url + "/mcp", headers=HEADERS, body=INITIALIZE)
    await response.read()
    return response.status == 200


async def test_an_idle_session_ends_with_its_program(start_workers: StartWorkers) -> None:
    # Looked over every quarter of a second: what is not recorded yet does not count as gone.
    workers = await start_workers("stdio_app", 2, options=program("slow", idle_timeout=2.0))
    session, held = await Session.initialize(workers[0].url), await Session.initialize(workers[0].url)
    pids = [await pid_of(session), await pid_of(held)]
    standalone = await held.get(base_url=workers[1].url)
    await until(lambda: gone(pids[0]))
    assert (await session.call("echo", {"text": "x"}, base_url=workers[1].url)).status == 404
    assert await held.call_result("echo", {"text": "held by its reader"}) == "held by its reader"
    standalone.cut()


async def test_a_flood_is_slowed_down_and_costs_bounded_memory(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 1, options=program())
    session = await Session.initialize(workers[0].url)
    before = resident_bytes(workers[0].pid)
    response = await session.call("flood", {"seconds": 3.0, "size": 100_000}, progress_token="t")
    response.abandon()
    highest = before
    for _ in range(30):
        await asyncio.sleep(0.1)
        highest = max(highest, resident_bytes(workers[0].pid))
    assert highest - before < 50_000_000
    await session.delete()
