"""Workers behind PgBouncer in transaction mode, where every transaction may run on another connection."""

from __future__ import annotations

import asyncio

import pytest

from mcp_pg_events import retention
from mcp_pg_events.errors import ConfigurationError
from tests.faults.conftest import StartServer, WorkersOn
from tests.support.calls import Counting, assert_serving, assert_sound, complaints, flow
from tests.support.mcp_http import Session
from tests.support.pgbouncer import PgBouncer
from tests.support.postgres import PASSWORD
from tests.support.servers import ROLE

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


async def test_in_session_mode_nothing_has_to_be_set(start_server: StartServer, workers_on: WorkersOn) -> None:
    server = await start_server()
    async with PgBouncer.before(server, mode="session", pool_size=20) as bouncer:
        workers = await workers_on(bouncer.dsn)
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(flow(workers, *workers.members))
        for worker in workers.members:
            # It cannot tell the modes apart, and goes without prepared statements in either.
            [said] = complaints(worker)
            assert "prepare_threshold=None" in said
        await assert_sound(server)


@pytest.mark.parametrize("pool_size", [1, 3])
async def test_a_retention_pass_leaves_no_lock_and_no_setting_behind_in_a_pool(
    start_server: StartServer, pool_size: int
) -> None:
    server = await start_server()
    async with PgBouncer.before(server, pool_size=pool_size) as bouncer:
        with pytest.raises(ConfigurationError, match="give a direct connection"):
            await asyncio.to_thread(retention.run, bouncer.dsn, schema="mcp_events")
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    assert await server.execute(locks) == [(0,)]
    report = await asyncio.to_thread(retention.run, server.admin_dsn, schema="mcp_events")
    assert not report.busy


async def test_a_retention_pass_runs_through_a_pool_in_session_mode(start_server: StartServer) -> None:
    server = await start_server()
    for table in ("events", "settings"):
        await server.execute(f"ALTER TABLE mcp_events.{table} OWNER TO {ROLE}")
    async with PgBouncer.before(server, mode="session") as bouncer:
        report = await asyncio.to_thread(retention.run, bouncer.dsn, schema="mcp_events")
        assert report.partitions and not report.busy
        again = await asyncio.to_thread(retention.run, bouncer.dsn, schema="mcp_events")
        assert not again.busy
