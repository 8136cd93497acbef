"""`store.health()` and its two routes, while all is well, while the worker leaves, and while the database is away."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from starlette.applications import Starlette
from starlette.routing import Mount

from mcp_pg_events import PostgresStore, durable, errors, health_routes
from mcp_pg_events.health import Health
from tests.integration.apps import mcpserver
from tests.support.calls import Counting
from tests.support.log import open_call, open_session, parts
from tests.support.mcp_http import Session, request
from tests.support.postgres import database_name, dsn_url
from tests.support.serving import serving
from tests.support.tcp_proxy import TcpProxy
from tests.support.until import until

pytestmark = pytest.mark.anyio


async def ask(url: str, path: str) -> tuple[int, Any]:
    response = await request("GET", url + path)
    assert response.headers["cache-control"] == "no-store"
    return response.status, await response.json()


async def test_a_store_says_how_it_is_before_while_and_after_it_is_open(migrated: str) -> None:
    store = PostgresStore(migrated)
    assert await store.health() == Health(None, False, False, False, False, 0.0, 0, 0, 0)
    assert (await store.health()).status == "starting"
    async with store:
        key, _ = await open_session(store)
        call = await open_call(store, key)
        reader = store.hub.subscribe(call.number, key.session_id, 1)
        health = await store.health()
        assert health == Health(store.worker_number(), True, True, False, False, 0.0, 1, 1, 0)
        assert health.ready
        store.hub.unsubscribe(reader)
        await store.log.append(call, b'{"result":{}}', final=True)
        assert (await store.health())[-3:] == (0, 0, 0)
    assert (await store.health()).status == "starting"


async def test_a_frozen_database_is_noticed_in_time_and_the_worker_goes_on_living(migrated: str) -> None:
    there = conninfo_to_dict(migrated)
    async with TcpProxy.to(str(there["host"]), int(there["port"] or 5432)) as wire:
        store = PostgresStore(dsn_url(migrated, host="127.0.0.1", port=wire.port))
        app = Starlette(
            routes=[*health_routes(store), Mount("/", mcp := durable(mcpserver().streamable_http_app(), store))],
            lifespan=mcp.router.lifespan_context,
        )
        async with serving(app) as url:
            session = await Session.initialize(url)
            assert await ask(url, "/livez") == (200, {"status": "live"})
            assert await ask(url, "/readyz") == (200, {"status": "ready"})
            call = await Counting.start(session, n=20, seconds=1)
            assert (await store.health())[-3:] == (1, 1, 1)
            wire.freeze()

            async def away() -> bool:
                began = time.monotonic()
                health = await store.health(timeout=0.2)
                assert time.monotonic() - began < 0.2 + 0.5
                return not health.database

            await until(away, timeout=3)
            began = time.monotonic()
            assert await ask(url, "/readyz") == (503, {"status": "unavailable"})
            assert time.monotonic() - began < 1.0 + 0.5
            assert await ask(url, "/livez") == (200, {"status": "live"})

            async def stalled() -> bool:
                return (await store.health(timeout=0.1)).stalled > 0

            await until(stalled)
            wire.thaw()

            async def ready() -> bool:
                return (await ask(url, "/readyz"))[0] == 200

            await until(ready)
            await call.finished()
            assert (await store.health()).stalled == 0


async def test_a_database_that_takes_no_writes_is_none_to_send_requests_to(migrated: str, postgres_dsn: str) -> None:
    database = sql.Identifier(database_name(migrated))
    async with PostgresStore(migrated) as store:

        async def takes_writes(setting: str) -> None:
            alter = sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = {}").format(database, setting)
            ended = sql.SQL("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = {}").format(
                database_name(migrated)
            )
            with psycopg.connect(postgres_dsn, autocommit=True) as connection:
                connection.execute(alter)
                connection.execute(ended)
            wanted = "unavailable" if setting == "on" else "ready"

            async def come() -> bool:
                return (await store.health()).status == wanted

            await until(come)

        await takes_writes("on")
        await takes_writes("off")


async def test_a_task_that_is_cancelled_while_it_waits_for_a_connection_ends(migrated: str) -> None:
    """psycopg's pool swallows the cancellation when it has just found a connection for whoever waits."""
    async with PostgresStore(migrated, max_connections=1) as store:
        database = parts(store).database
        slow = asyncio.create_task(database.fetch("SELECT pg_sleep(0.2)"))
        await asyncio.sleep(0.05)
        waiting = [asyncio.create_task(database.fetch("SELECT 1")) for _ in range(2)]
        # In the turn of the loop in which the connection comes back.
        slow.add_done_callback(lambda _: [task.cancel() for task in waiting])
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2
        await slow


async def test_whoever_asks_often_asks_the_database_seldom(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with PostgresStore(migrated) as store:
        database = parts(store).database
        asked: list[object] = []
        fetch = database.fetch

        async def counted(statement: Any, *arguments: Any, **more: Any) -> Any:
            if b"read_only" in bytes(statement):
                asked.append(statement)
            return await fetch(statement, *arguments, **more)

        monkeypatch.setattr(database, "fetch", counted)
        answers = await asyncio.gather(*(store.health() for _ in range(100)))
        answers += await asyncio.gather(*(store.health() for _ in range(100)))
        assert all(health.ready for health in answers)
        assert len(asked) == 1


async def test_a_busy_pool_is_no_outage(migrated: str) -> None:
    async with PostgresStore(migrated, max_connections=1) as store:
        database = parts(store).database
        await database.fetch("SELECT 1")
        slow = asyncio.create_task(database.fetch("SELECT pg_sleep(0.6)"))
        await asyncio.sleep(0.1)
        assert (await store.health(timeout=0.3)).database
        await slow


async def test_a_worker_that_drains_is_not_ready_while_its_calls_go_on(migrated: str) -> None:
    store = PostgresStore(migrated)
    app = durable(mcpserver().streamable_http_app(), store)
    app.router.routes += health_routes(store, live="/alive", ready="/able")
    async with serving(app) as url:
        session = await Session.initialize(url)
        call = await Counting.start(session, n=10, seconds=1)
        draining = asyncio.create_task(store.drain())
        await call.ended()  # sent elsewhere
        assert await ask(url, "/able") == (503, {"status": "draining"})
        assert await ask(url, "/alive") == (200, {"status": "live"})
        assert (await store.health()).calls == 1
        await draining
        assert (await store.health())[3:] == (True, False, 0.0, 0, 0, 1)


async def test_a_fenced_worker_is_not_ready_until_it_has_a_new_number(migrated: str) -> None:
    async with PostgresStore(migrated) as store:
        number = store.worker_number()
        parts(store).writer.declared_dead()
        assert (await store.health()).status == "renewing"

        async def renewed() -> bool:
            return (await store.health()).ready

        await until(renewed)
        assert (await store.health()).worker != number


@pytest.mark.parametrize("paths", [{"live": "livez"}, {"ready": ""}, {"live": "/x", "ready": "/x"}])
def test_routes_that_cannot_work_are_refused(paths: dict[str, str]) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"slash|two paths"):
        health_routes(PostgresStore("postgresql://localhost/app"), **paths)


def test_a_route_can_be_left_out() -> None:
    store = PostgresStore("postgresql://localhost/app")
    assert [route.path for route in health_routes(store, live=None)] == ["/readyz"]
