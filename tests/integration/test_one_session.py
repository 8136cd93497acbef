"""One session over HTTP in this process, where a test can look into its handlers (invariants 14 and 17)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mcp.server.mcpserver import Context, MCPServer

from mcp_pg_events import PostgresStore, durable
from tests.support.deaf_proxy import dsn_through, target_of
from tests.support.log import parts, until
from tests.support.mcp_http import Session
from tests.support.serving import serving
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio


class Handlers:
    """A server whose tool sends progress until it is told to stop, and what that met."""

    def __init__(self) -> None:
        self.server = MCPServer("one session")
        self.met: list[BaseException] = []
        self.running = 0
        self.enough = asyncio.Event()
        self.sent = 0

        @self.server.tool()
        async def report(ctx: Context) -> str:  # type: ignore[type-arg]
            self.running += 1
            try:
                while not self.enough.is_set():
                    await ctx.report_progress(self.sent, None, "on the way")
                    self.sent += 1
                    await asyncio.sleep(0)
            except BaseException as error:
                self.met.append(error)
                raise
            finally:
                self.running -= 1
            return "reported"

        @self.server.tool()
        async def echo(text: str) -> str:
            return text


@contextlib.asynccontextmanager
async def app(dsn: str, **options: Any) -> AsyncIterator[tuple[str, Handlers, PostgresStore]]:
    handlers, store = Handlers(), PostgresStore(dsn, **{"drain_timeout": 1, **options})
    async with serving(durable(handlers.server.streamable_http_app(), store)) as url:
        yield url, handlers, store
        handlers.enough.set()


async def test_no_database_error_reaches_a_handler_and_the_session_goes_on(migrated_once: str) -> None:
    """An outage longer than its bound: the call ends with an error, and the same session serves the next one here."""
    async with TcpProxy.to(*target_of(migrated_once)) as proxy:
        through = dsn_through(proxy, migrated_once)
        async with app(through, listen_dsn=migrated_once, outage_timeout=0.4) as (url, handlers, store):
            session = await Session.initialize(url)
            call = await session.call("report", progress_token="t", id="long")
            events = call.events()
            first = [await anext(events) for _ in range(3)]
            await proxy.refuse()
            # The response ends, and the handler is told as by a cancellation, if at all.
            async with asyncio.timeout(10):
                seen = first + [event async for event in events]
            assert call.complete
            await until(lambda: handlers.running == 0)
            assert {type(error) for error in handlers.met} <= {asyncio.CancelledError}, handlers.met
            await proxy.restore()
            await until(lambda: not parts(store).writer.lost)
            assert await session.call_result("echo", {"text": "still here"}) == "still here"
            # Whoever resumes the call gets an error, after what was stored.
            resumed = await session.get(seen[-1].id)
            rest = [event.message async for event in resumed.events() if event.data]
            # Its worker's, or that of whoever found the old number's lock free first.
            assert rest[-1]["error"]["data"]["reason"] in ("outage", "worker_lost")
            assert rest[-1]["id"] == "long"
            await until(lambda: store.hub.sessions() == set())


async def test_a_short_outage_is_not_noticed_by_a_handler_at_all(migrated_once: str) -> None:
    async with TcpProxy.to(*target_of(migrated_once)) as proxy:
        async with app(dsn_through(proxy, migrated_once), listen_dsn=migrated_once) as (url, handlers, _):
            session = await Session.initialize(url)
            call = await session.call("report", progress_token="t", id="long")
            events = call.events()
            found = [await anext(events) for _ in range(3)]
            for _ in range(3):
                await proxy.refuse()
                before = handlers.sent
                await proxy.restore()
                await until(lambda before=before: handlers.sent > before + 10)  # type: ignore[misc]
            handlers.enough.set()
            async with asyncio.timeout(10):
                found += [event async for event in events]
            assert handlers.met == []
            seqs = [int((event.id or "").split("-")[1]) for event in found]
            assert seqs == list(range(len(found)))
            assert found[-1].message["result"]["content"][0]["text"] == "reported"


@pytest.mark.parametrize("version", ["2025-03-26", "2025-06-18"])
async def test_clients_that_know_no_priming_get_no_event_without_data_when_they_resume(
    version: str, migrated_once: str
) -> None:
    async with app(migrated_once) as (url, _, store):
        session = await Session.initialize(url, version)
        response = await session.call("echo", {"text": "x"})
        events = [event async for event in response.events()]
        assert [bool(event.data) for event in events] == [True]
        stream = (events[0].id or "").partition("-")[0]
        resumed = await session.get(f"{stream}-0")
        assert [event async for event in resumed.events()] == events
        # The standalone stream, which the server ends: no cursor on the way out either.
        standalone = await session.get()
        assert standalone.status == 200
        store.hub.drain()
        assert [event async for event in standalone.events()] == []
        assert standalone.complete
