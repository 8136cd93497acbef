"""Programs on stdio whose replica loses its database, for a while or for too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tests.faults.conftest import StartServer
from tests.support.calls import Counting
from tests.support.mcp_http import Session, close_all
from tests.support.processes import gone
from tests.support.programs import pid_of, program
from tests.support.until import until
from tests.support.workers import run_workers

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
async def connections(anyio_backend: str) -> AsyncIterator[None]:
    """What a test leaves open is closed in its own loop."""
    yield
    close_all()


async def test_a_restart_of_the_database_loses_nothing(start_server: StartServer) -> None:
    server = await start_server()
    async with run_workers("stdio_app", server.dsn, 2, options=program()) as workers:
        session = await Session.initialize(workers[0].url)
        calls = [await Counting.start(session, n=100, seconds=3.0, base_url=url) for url in workers.urls]
        await server.restart()
        async with asyncio.timeout(20):
            for call in calls:
                await call.finished()
        assert await session.call_result("echo", {"text": "on"}, base_url=workers[1].url) == "on"


@pytest.mark.slow
async def test_an_outage_that_lasts_too_long_ends_the_session_and_its_program(start_server: StartServer) -> None:
    server = await start_server()
    async with run_workers("stdio_app", server.dsn, 1, options=program(outage_timeout=2.0)) as workers:
        session = await Session.initialize(workers[0].url)
        pid = await pid_of(session)
        call = await Counting.start(session, n=1000, seconds=60.0)
        await server.stop("immediate")
        await until(lambda: gone(pid), timeout=15)
        await server.start()
        assert call.events

        async def over() -> bool:
            return (await session.call("echo", {"text": "x"})).status == 404

        await until(over, timeout=15)
        again = await Session.initialize(workers[0].url)
        assert await again.call_result("echo", {"text": "on"}) == "on"
