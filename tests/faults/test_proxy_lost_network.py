"""The host of a proxy's upstream is gone without a word: no packet arrives, and none is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.calls import Counting
from tests.support.mcp_http import Session, close_all
from tests.support.network import Network
from tests.support.workers import Worker, run_workers

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

DEAD_AFTER = 12
CONNECT_TIMEOUT = 4.0
PATIENCE = 5.0


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as made:
        yield made


@pytest.fixture
async def replica(migrated: str, network: Network) -> AsyncIterator[Worker]:
    """A replica, whose upstream is on a host of its own and keeps its events in memory."""
    options = {"app": {"host": network.guest}, "memory_events": True}
    async with run_workers("mcpserver_app", None, 0, options=options) as upstream:
        served = await upstream.add(host=network.guest, inside=network.command)
        environment = {"TEST_UPSTREAM": f"{served.url}/mcp"}
        bounds = {"DEAD_AFTER": DEAD_AFTER, "CONNECT_TIMEOUT": CONNECT_TIMEOUT}
        proxy = {"proxy": {"patience": PATIENCE}, "upstream": bounds}
        async with run_workers("proxied_app", migrated, 1, environment=environment, options=proxy) as replicas:
            try:
                yield replicas[0]
            finally:
                network.restore()
                close_all()
                replicas.show()


async def test_a_network_that_comes_back_in_time_costs_a_call_nothing(replica: Worker, network: Network) -> None:
    session = await Session.initialize(replica.url)
    counting = await Counting.start(session, n=40, seconds=4)
    network.cut()
    await asyncio.sleep(3)
    network.restore()
    await counting.finished()


async def test_a_call_whose_upstream_is_gone_ends_with_an_error(replica: Worker, network: Network) -> None:
    session = await Session.initialize(replica.url)
    counting = await Counting.start(session, n=400, seconds=200)
    assert await session.call_result("echo", {"text": "x"}) == "x"
    network.cut()
    cut = time.monotonic()
    # On the connection that is kept, which takes the request and gives no answer; then on one that is made anew.
    kept = await session.call("echo", {"text": "kept"})
    assert (kept.status, kept.headers["content-type"]) == (504, "application/json")
    assert f"The upstream's host took nothing for {DEAD_AFTER} seconds" in (await kept.read()).decode()
    assert time.monotonic() - cut < DEAD_AFTER + 5
    anew = time.monotonic()
    assert (await session.call("echo", {"text": "anew"})).status == 503
    assert time.monotonic() - anew < CONNECT_TIMEOUT + 5
    await counting.ended(DEAD_AFTER + PATIENCE + CONNECT_TIMEOUT + 5)
    assert counting.events[-1].message["error"]["data"] == {"reason": "upstream_lost"}
    assert time.monotonic() - cut < DEAD_AFTER + PATIENCE + CONNECT_TIMEOUT + 5
    network.restore()
    # The upstream has the session still: nothing of it is lost but that call.
    assert await session.call_result("echo", {"text": "back"}) == "back"


async def test_a_call_goes_on_when_its_upstreams_host_is_back(replica: Worker, network: Network) -> None:
    session = await Session.initialize(replica.url)
    counting = await Counting.start(session, n=90, seconds=DEAD_AFTER + 15)
    network.cut()
    await asyncio.sleep(DEAD_AFTER + 2)
    network.restore()
    # The SDK's server ends a response that it resumes while it believes in the one before: its client is to ask again.
    async with asyncio.timeout(60):
        while True:
            await counting.ended(60)
            if "method" not in counting.events[-1].message:
                break
            await counting.resumed(await session.get(counting.cursor))
    await counting.finished()
