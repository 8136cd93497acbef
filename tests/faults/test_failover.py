"""A failover to a streaming standby: nothing is lost where it is synchronous, nothing in silence where it is not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.faults.conftest import StartServer, WorkersOn
from tests.faults.test_death import final_of, waiting_call
from tests.support.calls import Counting, assert_posts_refused, assert_serving, assert_sound
from tests.support.mcp_http import ConnectionCut, Response, Session
from tests.support.resuming import split_id
from tests.support.servers import Server, failover_dsn
from tests.support.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.slow, pytest.mark.anyio]


class Standalone:
    """A client of the standalone stream, and the announcements that it got."""

    def __init__(self, response: Response) -> None:
        self.response = response
        self.ids: list[str] = []
        self.indexes: list[int] = []
        self._arrived = asyncio.Event()
        self.reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionCut):  # the worker goes with the test
            async for event in self.response.events():
                if event.data:
                    self.ids.append(event.id or "")
                    self.indexes.append(int(event.message["params"]["data"]["index"]))
                    self._arrived.set()

    async def until(self, events: int) -> None:
        async with asyncio.timeout(15):
            while len(self.ids) < events:
                self._arrived.clear()
                await self._arrived.wait()


@contextlib.asynccontextmanager
async def lagging_standby(primary: Server) -> AsyncIterator[tuple[Server, TcpProxy]]:
    """A standby whose replication can be held up while the primary acknowledges on."""
    async with TcpProxy.to(primary.host, primary.port) as wire, primary.standby(port=wire.port) as standby:
        yield standby, wire


async def test_with_a_synchronous_standby_calls_go_on_and_nothing_is_lost(
    start_server: StartServer, workers_on: WorkersOn
) -> None:
    primary = await start_server(synchronous_standby_names="standby")
    async with primary.standby() as standby:
        assert await primary.execute("SELECT sync_state FROM pg_stat_replication") == [("sync",)]
        workers = await workers_on(failover_dsn(primary, standby))
        session = await Session.initialize(workers[0].url)
        calls = [await Counting.start(session, n=200, seconds=4, base_url=workers[n % 2].url) for n in range(6)]
        elsewhere = await Counting.start(session, n=200, seconds=4)
        await elsewhere.resumed(await session.get(elsewhere.cut(), base_url=workers[1].url))
        standalone = Standalone(await session.get(base_url=workers[1].url))
        announcing = await session.call("announce", {"n": 60, "seconds": 4})
        await standalone.until(5)
        await primary.stop("immediate")
        await assert_posts_refused(session, workers[0].url)
        await standby.promote()
        for call in (*calls, elsewhere):
            await call.finished()
        assert "result" in await announcing.result()
        await standalone.until(60)
        assert standalone.indexes == list(range(60))
        for worker in workers.members:
            await assert_serving(session, worker.url)
        await assert_sound(standby, failed_over=True)
        assert await standby.execute("SELECT 1 FROM mcp_events.workers WHERE ended_at IS NOT NULL") == []


async def test_without_a_synchronous_standby_what_is_lost_ends_with_an_error(
    start_server: StartServer, workers_on: WorkersOn
) -> None:
    primary = await start_server()
    async with lagging_standby(primary) as (standby, wire):
        workers = await workers_on(failover_dsn(primary, standby))
        here, there = workers.members
        session = await Session.initialize(here.url)
        idle, _ = await waiting_call(workers, session, "idle")
        attached = await Counting.start(session, n=300, seconds=6)
        remote = await Counting.start(session, n=300, seconds=6)
        await remote.resumed(await session.get(remote.cut(), base_url=there.url))
        early = await Counting.start(session, n=300, seconds=6)
        late = await Counting.start(session, n=300, seconds=6)
        standalone = Standalone(await session.get(base_url=there.url))
        announcing = await session.call("announce", {"n": 60, "seconds": 6})
        await standalone.until(5)
        cursor = early.cut()
        await replicated(primary)

        # From here on the standby gets nothing, and everything is acknowledged as before.
        wire.freeze()
        kept = {call: len(call.events) for call in (attached, remote, late)}
        unknown = await Session.initialize(there.url)
        lost_streams = [await last_id(session, there.url) for _ in range(40)]
        for call, events in kept.items():
            await call.until(events + 30)
        await standalone.until(15)
        lost_cursor, lost_announcement = late.cut(), standalone.ids[-1]
        await primary.stop("immediate")
        await wire.refuse()
        await standby.promote()

        # Whoever is attached gets everything up to now, and then an error under a number that nobody had before.
        for call in (attached, remote):
            await call.ended()
            *progress, final = call.events
            assert [int(event.message["params"]["message"]) for event in progress] == list(range(len(progress)))
            assert final.message["error"]["data"] == {"reason": "data_lost"}, final
            assert split_id(final.id or "")[1] > len(progress)
        # Who comes back from before the loss gets what is left, and the same error. From within it: refused.
        await early.resumed(await session.get(cursor, base_url=there.url))
        await early.ended()
        *progress, final = early.events
        assert [int(event.message["params"]["message"]) for event in progress] == list(range(len(progress)))
        assert final.message["error"]["data"] == {"reason": "data_lost"}, final
        await assert_unknown(session, lost_cursor)
        # What lost nothing goes on.
        workers.release("idle")
        assert "result" in (await final_of(idle, 10)).message
        # The standalone stream goes on under numbers that it had not given before.
        assert "result" in await announcing.result()
        await standalone.until(60)
        assert standalone.indexes == list(range(60))
        assert len(set(standalone.ids)) == 60
        await assert_unknown(session, lost_announcement)
        # A session of the lost time is gone, and so are its streams: their numbers are never another one's.
        assert (await unknown.call("echo", {"text": "?"}, base_url=there.url)).status == 404
        again = [await last_id(session, worker.url) for worker in workers.members for _ in range(10)]
        assert not set(again) & set(lost_streams)
        for lost in lost_streams:
            await assert_unknown(session, lost)
        for worker in workers.members:
            await assert_serving(session, worker.url)
            assert sum("lost acknowledged events" in line for line in worker.output().splitlines()) <= 4


async def replicated(primary: Server) -> None:
    """Wait until the standby has what is in the log by now; only asking tells."""
    [(position,)] = await primary.execute("SELECT pg_current_wal_lsn()::text")
    query = "SELECT 1 FROM pg_stat_replication WHERE replay_lsn >= %s::pg_lsn"
    async with asyncio.timeout(10):
        while not await primary.execute(query, position):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.02)


async def last_id(session: Session, base_url: str) -> str:
    """The id of the result of a short call."""
    response = await session.call("echo", {"text": "x"}, base_url=base_url)
    return [event.id or "" async for event in response.events()][-1]


async def assert_unknown(session: Session, cursor: str) -> None:
    response = await session.get(cursor)
    body = await response.json()
    assert (response.status, body["error"]["data"]) == (400, {"reason": "unknown"}), (cursor, response.status, body)
