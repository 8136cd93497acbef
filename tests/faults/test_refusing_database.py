"""A database that is there and does not do its work: frozen, locked, full, read-only, closed to its role.

All tests share two workers and a server: each trouble passes, and leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import psycopg
import pytest

from tests.faults.test_death import TRUST
from tests.support.calls import (
    DELETED,
    QUICKLY,
    Counting,
    assert_posts_refused,
    assert_refused,
    assert_serving,
    assert_sound,
    complaints,
    initialize,
)
from tests.support.mcp_http import Session, close_all
from tests.support.postgres import PASSWORD
from tests.support.servers import ROLE, Cluster, Server
from tests.support.workers import Worker, Workers, run_workers

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

LASTS = 5.0
"""How long a trouble lasts, in seconds."""

LISTENING = "pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objid::bigint = {})"


@dataclass(frozen=True, slots=True)
class Place:
    """A server, and two workers on it."""

    server: Server
    workers: Workers


@pytest.fixture(scope="module")
async def shared_place(cluster: Cluster, anyio_backend: str) -> AsyncIterator[Place]:
    options = {"durable": {"keep_alive": 1, "poll_interval": 1, "drain_timeout": 1}}
    async with (
        Server.copy_of(cluster, max_locks_per_transaction=10, max_connections=40) as server,
        run_workers("mcpserver_app", server.dsn, 2, options=options) as workers,
    ):
        yield Place(server, workers)


@pytest.fixture
async def place(shared_place: Place) -> AsyncIterator[Place]:
    shared_place.workers.forget()
    yield shared_place
    close_all()
    shared_place.workers.show()


# --- troubles ---------------------------------------------------------------------------------------------------------

Trouble = Callable[[Server], contextlib.AbstractAsyncContextManager[None]]


@contextlib.asynccontextmanager
async def frozen(server: Server) -> AsyncIterator[None]:
    """Every process is stopped; the kernel goes on acknowledging what they do not read."""
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


@contextlib.asynccontextmanager
async def locked(server: Server) -> AsyncIterator[None]:
    """Somebody's migration holds the tables."""
    async with server.session() as other:
        await other.execute("LOCK TABLE mcp_events.events, mcp_events.streams IN ACCESS EXCLUSIVE MODE")
        yield


@contextlib.asynccontextmanager
async def out_of_locks(server: Server) -> AsyncIterator[None]:
    """The table of locks is full: every transaction that writes needs a place in it."""
    async with server.session() as other:
        await other.set_autocommit(True)
        first = 0
        for step in (100, 1):
            with contextlib.suppress(psycopg.errors.OutOfMemory):
                while True:
                    await other.execute(
                        "SELECT pg_advisory_lock(n) FROM generate_series(%s::int, %s) n", (first, first + step - 1)
                    )
                    first += step
            first += step
        yield


@contextlib.asynccontextmanager
async def read_only(server: Server) -> AsyncIterator[None]:
    """As some services do it when the disk is full."""
    await server.configure("default_transaction_read_only", "on")
    try:
        yield
    finally:
        await server.configure("default_transaction_read_only", None)


@contextlib.asynccontextmanager
async def read_only_connections(server: Server) -> AsyncIterator[None]:
    """Connections begin read-only and stay so, as those to a standby would."""
    await server.execute(f"ALTER ROLE {ROLE} SET default_transaction_read_only = on")
    await server.end_connections()
    try:
        yield
    finally:
        await server.execute(f"ALTER ROLE {ROLE} RESET default_transaction_read_only")


@contextlib.asynccontextmanager
async def at_the_connection_limit(server: Server) -> AsyncIterator[None]:
    """The role has lost its connections, and gets no new ones."""
    await server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 0")
    await server.end_connections()
    try:
        yield
    finally:
        await server.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT -1")


@contextlib.asynccontextmanager
async def another_password(server: Server) -> AsyncIterator[None]:
    """The role's password was changed, and its connections were ended."""
    await server.execute(f"ALTER ROLE {ROLE} PASSWORD 'another'")
    await server.end_connections()
    try:
        yield
    finally:
        await server.execute(f"ALTER ROLE {ROLE} PASSWORD '{PASSWORD}'")


TROUBLES: dict[Trouble, str] = {
    read_only: "read-only transaction",
    frozen: "not answer|connection timeout expired",
    out_of_locks: "out of shared memory",
    at_the_connection_limit: f'too many connections for role "{ROLE}"',
    another_password: f'password authentication failed for user "{ROLE}"',
    locked: "not answer",
    read_only_connections: "read-only transaction",
}
"""Each with what the log has to say about it. What was said a moment ago is not said again: no two alike in a row."""


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
async def test_calls_wait_for_it_and_requests_are_refused(trouble: Trouble, place: Place) -> None:
    server, workers = place.server, place.workers
    here, there = workers.members
    # A server that answers nothing gets a second to take the cancellation.
    within = QUICKLY + 1 if trouble is frozen else QUICKLY
    session = await Session.initialize(here.url)
    deleted = await Session.initialize(here.url)
    attached = await Counting.start(session)
    remote = await Counting.start(session)
    await remote.resumed(await session.get(remote.cut(), base_url=there.url))
    lost = await Counting.start(session)
    async with trouble(server):
        began = asyncio.get_running_loop().time()
        heard = attached.keep_alives, remote.keep_alives
        returning = asyncio.create_task(session.get(lost.cut(), base_url=there.url))
        async with asyncio.TaskGroup() as group:
            group.create_task(assert_refused("DELETE", deleted.delete(), DELETED))
            for worker in workers.members:
                group.create_task(
                    assert_posts_refused(session, worker.url, within, notifications=trouble is not out_of_locks)
                )
        await asyncio.sleep(began + LASTS - asyncio.get_running_loop().time())
        assert not returning.done()
        assert attached.keep_alives > heard[0] and remote.keep_alives > heard[1]
    await lost.resumed(await asyncio.wait_for(returning, 5))
    for call in (attached, remote, lost):
        await call.finished()
    for worker in workers.members:
        await assert_serving(session, worker.url)
    await assert_sound(server)
    for worker in workers.members:
        said = "\n".join(complaints(worker))
        assert re.search(TROUBLES[trouble], said), said
        assert PASSWORD not in worker.output()
        assert len(said.splitlines()) <= 12, said
    assert await dead(server) == 0


@pytest.mark.parametrize("trouble", ["limit", "password"])
async def test_connections_that_are_there_go_on(trouble: str, place: Place) -> None:
    """The role may open no more of them: what there is serves on, and who cannot listen is not taken for dead."""
    server, workers = place.server, place.workers
    here, there = workers.members
    session = await Session.initialize(here.url)
    deaf = await number_of(server, there)
    await trusting(server)
    call = await Counting.start(session, seconds=4)
    remote = await Counting.start(session, seconds=4, base_url=there.url)
    await remote.resumed(await session.get(remote.cut(), base_url=here.url))
    change = "CONNECTION LIMIT 1" if trouble == "limit" else "PASSWORD 'another'"
    back = "CONNECTION LIMIT -1" if trouble == "limit" else f"PASSWORD '{PASSWORD}'"
    await server.execute(f"ALTER ROLE {ROLE} {change}")
    try:
        # Its last sign is some seconds old, and its event loop does not turn when its listener ends.
        await stamped_for(server, deaf, 1.5)
        blocked = asyncio.create_task(session.call_result("block", {"seconds": 0.5}, base_url=there.url))
        assert await server.end_connections(LISTENING.format(deaf)) == 1
        assert await blocked == "blocked"
        async with asyncio.TaskGroup() as group:
            for worker in workers.members:
                for _ in range(10):
                    group.create_task(assert_echo(session, worker.url))
        # Longer than a worker that gives no sign is left alone.
        await call.finished()
        await remote.finished()
        assert await dead(server) == 0
    finally:
        await server.execute(f"ALTER ROLE {ROLE} {back}")
    async with asyncio.timeout(10):
        while "Listening again" not in there.output():  # noqa: ASYNC110 (a file)
            await asyncio.sleep(0.05)
    for worker in workers.members:
        await assert_serving(session, worker.url)
        assert PASSWORD not in worker.output()
    said = "\n".join(complaints(there))
    assert re.search("too many connections|password authentication failed", said), said
    assert len(said.splitlines()) <= 6, said
    assert complaints(here) == []


async def assert_echo(session: Session, base_url: str) -> None:
    assert await session.call_result("echo", {"text": "on"}, base_url=base_url) == "on"


async def test_transactions_that_are_ended_for_idling_cost_their_request_alone(place: Place) -> None:
    """A limit of one millisecond, which a round trip can take: what needs several statements may fail, no more."""
    server, workers = place.server, place.workers
    session = await Session.initialize(workers[0].url)
    calls = [await Counting.start(session, base_url=worker.url) for worker in workers.members]
    await server.configure("idle_in_transaction_session_timeout", "1")
    statuses: list[int] = []
    for number in range(10):
        worker = workers[number % 2]
        answer = await initialize(worker.url)
        statuses.append(answer.status)
        if answer.status == 200:
            other = Session(worker.url)
            other.session_id = answer.headers["mcp-session-id"]
            statuses.append((await other.delete()).status)
        else:
            assert "retry-after" in answer.headers
        await assert_echo(session, worker.url)
    assert set(statuses) <= {200, 503}, statuses
    # A writer that lost its connection looks in a transaction for what it had stored.
    await server.end_connections()
    await server.configure("idle_in_transaction_session_timeout", None)
    for call in calls:
        await call.finished()
    for worker in workers.members:
        await assert_serving(session, worker.url)
    await assert_sound(server)
    assert await dead(server) == 0


async def number_of(server: Server, worker: Worker) -> int:
    """A worker's number in the database."""
    [(number,)] = await server.execute(
        "SELECT number FROM mcp_events.workers WHERE pid = %s AND ended_at IS NULL", worker.pid
    )
    return int(number)


async def trusting(server: Server) -> None:
    """Wait until every worker has listened for long enough to judge the others."""
    [(seconds,)] = await server.execute(
        """
        SELECT extract(epoch FROM max(backend_start) + %s * interval '1 s' - now())::float8 FROM pg_stat_activity
         WHERE usename = %s AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')
        """,
        TRUST + 0.5,
        ROLE,
    )
    await asyncio.sleep(max(0.0, seconds))


async def stamped_for(server: Server, number: int, seconds: float) -> None:
    """Wait until the last stamp of a worker is so old."""
    query = "SELECT 1 FROM mcp_events.workers WHERE number = %s AND seen_at < now() - %s * interval '1 s'"
    async with asyncio.timeout(10):
        while not await server.execute(query, number, seconds):  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.05)


async def dead(server: Server) -> int:
    """How many workers were declared dead, or gave up."""
    return len(await server.execute("SELECT number FROM mcp_events.workers WHERE ended_at IS NOT NULL"))
