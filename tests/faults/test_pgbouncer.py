"""Workers behind PgBouncer in transaction mode, where every transaction may run on another connection."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.faults.conftest import StartServer, WorkersOn
from tests.support.calls import Counting, assert_serving, assert_sound, complaints
from tests.support.mcp_http import Session
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import PASSWORD
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio


async def flow(workers: Workers) -> None:
    """All that a session may do, on two workers: calls at once, a cut and a resumption, a question, its end."""
    here, there = workers.members
    session = await Session.initialize(here.url, capabilities={"elicitation": {}})
    standalone = await session.get(base_url=there.url)
    await anext(standalone.events())
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(assert_echo(session, workers[number % 2].url))
    counting = await Counting.start(session, n=50, seconds=1)
    await counting.resumed(await session.get(counting.cut(), base_url=there.url))
    await counting.finished()
    asking = await session.call("ask", {"question": "who?"})
    events = asking.events()
    async for event in events:
        if event.data and event.message.get("method") == "elicitation/create":
            answer = {"action": "accept", "content": {"answer": "me"}}
            assert await session.answer(event.message["id"], answer, base_url=there.url) == 202
            break
    [final] = [event.message async for event in events]
    assert json.loads(final["result"]["content"][0]["text"])["content"] == {"answer": "me"}
    await session.call("note_cancellation", {"key": f"{session.session_id}"}, id="endless")
    await workers.wait_for(f"{session.session_id}")
    cancelled = {"requestId": "endless"}
    assert await session.notify("notifications/cancelled", cancelled, base_url=there.url) == 202
    async with asyncio.timeout(5):
        while not (workers.directory / f"{session.session_id}.cancelled").exists():  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.01)
    assert (await session.delete(base_url=there.url)).status == 200
    assert (await session.call("echo", {"text": "gone"})).status == 404
    assert await asyncio.wait_for(standalone.drain(), 5)


async def assert_echo(session: Session, base_url: str) -> None:
    assert await session.call_result("echo", {"text": "on"}, base_url=base_url) == "on"


async def test_listening_through_transaction_mode_is_refused_and_with_a_direct_listen_dsn_everything_works(
    start_server: StartServer, workers_on: WorkersOn
) -> None:
    server = await start_server()
    async with PgBouncer.before(server) as bouncer:
        with pytest.raises(AssertionError, match="did not start") as failure:
            await workers_on(bouncer.dsn, 1, prepare_threshold=None)
        assert "PgBouncer in transaction mode" in str(failure.value)
        assert "listen_dsn" in str(failure.value)
        assert PASSWORD not in str(failure.value)

        workers = await workers_on(bouncer.dsn, listen_dsn=server.dsn, prepare_threshold=None)
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(flow(workers))
        workers.assert_clean_logs()
        # PostgreSQL goes and comes back behind it.
        session = await Session.initialize(workers[0].url)
        calls = [await Counting.start(session, base_url=worker.url) for worker in workers.members]
        await server.restart("fast")
        for call in calls:
            await call.finished()
        for worker in workers.members:
            await assert_serving(session, worker.url)
        await assert_sound(server)


async def test_prepared_statements_are_left_out_behind_a_pooler(
    start_server: StartServer, workers_on: WorkersOn
) -> None:
    """They are psycopg's default, and PgBouncer 1.18 would run one client's in place of another's."""
    server = await start_server()
    async with PgBouncer.before(server) as bouncer:
        workers = await workers_on(bouncer.dsn, listen_dsn=server.dsn)
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(flow(workers))
        for worker in workers.members:
            [said] = complaints(worker)
            assert "prepare_threshold=None" in said
        await assert_sound(server)
