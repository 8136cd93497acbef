"""How a worker ends, and who notices (invariants 12 and 15): SIGKILL, freezing, blocking, lost connections, fencing."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from tests.e2e.conftest import StartWorkers
from tests.support.mcp_http import Response, Session
from tests.support.sse import Event
from tests.support.until import until
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio

TRUST = 5.0
"""How long a worker listens before it judges others (`watch.TRUST`), in seconds."""


async def waiting_call(workers: Workers, session: Session, key: str, worker: int = 0) -> tuple[Response, str]:
    """A call that waits, and the id of its first event."""
    response = await session.call("wait", {"key": key}, progress_token="t", id=key, base_url=workers[worker].url)
    async for event in response.events():
        if event.data:
            await workers.wait_for(key)
            return response, event.id or ""
    raise AssertionError("The call ended before it waited.")


async def final_of(response: Response, timeout: float) -> Event:
    async with asyncio.timeout(timeout):
        return [event async for event in response.events()][-1]


async def trusted(workers: Workers, dsn: str) -> None:
    """Wait until the youngest worker has listened for long enough to judge others."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        cursor = await connection.execute(
            "SELECT extract(epoch FROM max(started_at) + %s * interval '1 s' - now()) FROM mcp_events.workers",
            (TRUST + 0.5,),
        )
        row = await cursor.fetchone()
    assert row is not None
    await asyncio.sleep(max(0.0, float(row[0])))


async def rows(dsn: str, query: str, *parameters: object) -> list[tuple]:
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        return await (await connection.execute(query, parameters or None)).fetchall()


async def test_a_request_that_is_sent_again_since_its_worker_was_killed_is_given_its_end(
    migrated: str, start_workers: StartWorkers
) -> None:
    """As a load balancer does whose first attempt was cut before the headers."""
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url)
    response, _ = await waiting_call(workers, session, "a")
    await trusted(workers, migrated)
    refused = await session.call("wait", {"key": "a"}, id="a", base_url=workers[1].url)
    assert refused.status == 409, "its worker lives"
    killing = asyncio.create_task(workers[0].kill())
    again = await session.call("wait", {"key": "a"}, id="a", base_url=workers[1].url)
    await killing
    assert again.status == 200
    final = (await final_of(again, 4)).message
    assert (final["id"], final["error"]["data"]) == ("a", {"reason": "worker_lost"})
    assert await rows(migrated, "SELECT count(*) FROM mcp_events.streams WHERE request_id = '\"a\"'") == [(1,)]
    response.close()


async def test_a_killed_worker_gives_its_calls_an_error_to_who_waits_and_who_returns(
    migrated: str, start_workers: StartWorkers
) -> None:
    workers = await start_workers("mcpserver_app", 3)
    session = await Session.initialize(workers[0].url)
    attached, _ = await waiting_call(workers, session, "a")
    returning, cursor = await waiting_call(workers, session, "b")
    # One client reads through another worker already, one comes back after the kill.
    waiting = await session.get(f"{cursor.split('-')[0]}-0", base_url=workers[2].url)
    elsewhere, _ = await waiting_call(workers, session, "c", worker=1)
    await trusted(workers, migrated)
    await workers[0].kill()
    killed = time.monotonic()
    final = (await final_of(waiting, 4)).message
    assert final["id"] == "b"
    assert final["error"]["data"] == {"reason": "worker_lost"}
    assert time.monotonic() - killed < 2.0
    again = await session.get(cursor, base_url=workers[1].url)
    assert (await final_of(again, 3)).message == final
    assert time.monotonic() - killed < 3.0
    returning.close()
    attached.close()
    # Reaped once, by whoever came first; the living worker's call knows nothing of it.
    counted = await rows(
        migrated,
        "SELECT count(*), count(DISTINCT stream) FROM mcp_events.events WHERE payload LIKE '%worker_lost%'",
    )
    assert counted == [(2, 2)]
    workers.release("c")
    assert "result" in (await final_of(elsewhere, 3)).message


async def test_a_frozen_worker_is_fenced_after_the_timeout_and_goes_on_under_a_new_number(
    migrated: str, start_workers: StartWorkers
) -> None:
    workers = await start_workers("mcpserver_app", 2, options={"durable": {"unresponsive_timeout": 15}})
    session = await Session.initialize(workers[0].url)
    _, cursor = await waiting_call(workers, session, "f")
    await trusted(workers, migrated)
    workers[0].pause()
    frozen = time.monotonic()
    final = (await final_of(await session.get(cursor, base_url=workers[1].url), 25)).message
    assert final["error"]["data"] == {"reason": "worker_lost"}
    assert 9 < time.monotonic() - frozen < 20
    workers[0].resume()
    # It finds out that it was declared dead, and serves on; the call's tool cannot add to its stream any more.
    workers.release("f")
    await until(lambda: rows(migrated, "SELECT FROM mcp_events.workers WHERE ended_at IS NULL OFFSET 1"))
    assert await session.call_result("echo", {"text": "back"}, base_url=workers[0].url) == "back"
    stream = int(cursor.split("-")[0])
    events = await rows(migrated, "SELECT seq FROM mcp_events.events WHERE stream = %s ORDER BY seq", stream)
    assert events == [(1,), (2,)]


async def test_a_blocked_event_loop_is_not_a_dead_worker(migrated: str, start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url)
    _, cursor = await waiting_call(workers, session, "k")
    await trusted(workers, migrated)
    blocking = asyncio.create_task(session.call_result("block", {"seconds": 4}))
    resumed = await session.get(cursor, base_url=workers[1].url)
    assert await blocking == "blocked"
    workers.release("k")
    assert "result" in (await final_of(resumed, 5)).message


@pytest.mark.parametrize("which", ["listener", "all"])
async def test_terminated_connections_harm_nothing(which: str, migrated: str, start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url)
    _, cursor = await waiting_call(workers, session, "k")
    counting = await session.call("count", {"n": 40, "seconds": 4}, progress_token="c", id="c")
    await anext(counting.events())
    await trusted(workers, migrated)
    resumed = await session.get(cursor, base_url=workers[1].url)
    only = "AND (query LIKE 'LISTEN%' OR query LIKE '%lock_worker%')" if which == "listener" else ""
    ended = await rows(
        migrated,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE datname = current_database() AND pid <> pg_backend_pid() {only}",
    )
    assert len(ended) == 2 if which == "listener" else len(ended) >= 6
    await asyncio.sleep(3)  # longer than a dead worker lives
    workers.release("k")
    events = [event async for event in resumed.events() if event.data]
    assert [event.message.get("method") for event in events] == ["notifications/progress", None]
    assert "result" in events[-1].message
    counted = [event.message async for event in counting.events() if event.data]
    indices = [message["params"]["message"] for message in counted if "params" in message]
    assert indices == [str(n) for n in range(40)]
    assert await rows(migrated, "SELECT FROM mcp_events.workers WHERE ended_at IS NOT NULL") == []


async def test_a_living_worker_that_is_declared_dead_cancels_its_calls_and_serves_on(
    migrated: str, start_workers: StartWorkers
) -> None:
    workers = await start_workers("mcpserver_app", 1)
    session = await Session.initialize(workers[0].url)
    await session.call("note_cancellation", {"key": "fenced"})
    await workers.wait_for("fenced")
    await rows(
        migrated,
        "UPDATE mcp_events.workers SET ended_at = now(), ended_reason = 'test', epoch = epoch + 1 RETURNING number",
    )
    async with asyncio.timeout(10):
        while not (workers.directory / "fenced.cancelled").exists():  # noqa: ASYNC110 (made by another process)
            await asyncio.sleep(0.01)
    await until(lambda: rows(migrated, "SELECT FROM mcp_events.workers WHERE ended_at IS NULL"))
    assert await session.call_result("echo", {"text": "on"}) == "on"
