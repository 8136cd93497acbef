"""A worker whose network is lost, not its process: it is declared dead in time, and serves on when it is back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.faults.conftest import StartServer, WorkersOn
from tests.faults.test_death import final_of, rows, trusted, waiting_call
from tests.support.calls import Counting
from tests.support.mcp_http import Session
from tests.support.network import Network
from tests.support.servers import ROLE

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

# The app answers to the names of this machine alone.
HOST = {"Host": "127.0.0.1:80"}


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


async def test_a_worker_that_lost_its_network_loses_its_calls_and_serves_on_when_it_is_back(
    network: Network, start_server: StartServer, workers_on: WorkersOn
) -> None:
    server = await start_server(listen_addresses=f"127.0.0.1,{network.host}")
    workers = await workers_on(server.dsn, 1)
    here = workers[0]
    lost = await workers.add(
        host=network.guest, inside=network.command, MCP_PG_EVENTS_DSN=server.dsn_of(ROLE, host=network.host)
    )
    session = await Session.initialize(lost.url, headers=HOST)
    _, cursor = await waiting_call(workers, session, "k", worker=1)
    await session.call("note_cancellation", {"key": "fenced"})
    await workers.wait_for("fenced")
    elsewhere, _ = await waiting_call(workers, session, "e", worker=0)
    await trusted(workers, server.admin_dsn)
    waiting = await session.get(cursor, base_url=here.url)

    # Three seconds without a network are nothing.
    counting = await Counting.start(session, n=40, seconds=4, base_url=lost.url)
    await counting.resumed(await session.get(counting.cut(), base_url=here.url))
    network.cut()
    await asyncio.sleep(3)
    network.restore()
    await counting.finished()

    network.cut()
    cut = time.monotonic()
    final = (await final_of(waiting, 20)).message
    took = time.monotonic() - cut
    assert final["error"]["data"] == {"reason": "worker_lost"}
    assert took < 12, f"It took {took:.1f} s."
    # It does not know yet, and the call that the database has ended is still running there.
    assert not (workers.directory / "fenced.cancelled").exists()
    network.restore()
    async with asyncio.timeout(15):
        while not (workers.directory / "fenced.cancelled").exists():  # noqa: ASYNC110 (made by another process)
            await asyncio.sleep(0.05)
    async with asyncio.timeout(15):
        while (answer := await session.call("echo", {"text": "back"})).status != 200:  # noqa: ASYNC110 (its recovery)
            await asyncio.sleep(0.1)
    assert (await answer.result())["result"]["content"][0]["text"] == "back"
    ends = await rows(server.admin_dsn, "SELECT ended_reason FROM mcp_events.workers ORDER BY number")
    assert ends == [(None,), ("worker_lost",), (None,)]
    # A new call of the worker that was lost, and the call that never lost anything.
    resumed, _ = await waiting_call(workers, session, "again", worker=1)
    workers.release("again")
    workers.release("e")
    assert "result" in (await final_of(resumed, 5)).message
    assert "result" in (await final_of(elsewhere, 5)).message
