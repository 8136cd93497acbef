"""Workers behind PgBouncer in transaction mode, where every transaction may run on another connection."""

from __future__ import annotations

import asyncio

import pytest

from tests.faults.conftest import StartServer, WorkersOn
from tests.support.calls import Counting, assert_serving, assert_sound, complaints, flow
from tests.support.mcp_http import Session
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import PASSWORD

pytestmark = pytest.mark.anyio


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
                group.create_task(flow(workers, *workers.members))
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
                group.create_task(flow(workers, *workers.members))
        for worker in workers.members:
            [said] = complaints(worker)
            assert "prepare_threshold=None" in said
        await assert_sound(server)
