"""The log over PostgreSQL, several stores in one process standing for several workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, LiteralString
from uuid import uuid4

import psycopg
import pytest
from mcp.server.lowlevel import Server
from psycopg.conninfo import make_conninfo

from mcp_pg_events import PostgresStore, durable, migrate
from mcp_pg_events.backend import Event, OpenedSession, RequestInFlight, SessionKey, SessionUnknown, Stream
from mcp_pg_events.errors import AppendRefused, Error
from mcp_pg_events.worker import Worker

pytestmark = pytest.mark.anyio

NOTE = b'{"jsonrpc":"2.0","method":"notifications/message","params":{}}'
RESULT = b'{"jsonrpc":"2.0","id":1,"result":{}}'
VERSION = "2025-11-25"


# What the other integration tests use as well.


def parts(store: PostgresStore) -> Worker:
    """The running parts of a store: what a test has to look into, or to break."""
    return store._running_worker


@contextlib.asynccontextmanager
async def running(dsn: str, count: int, **options: Any) -> AsyncIterator[list[PostgresStore]]:
    """`count` stores on one database, each a worker of its own."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(PostgresStore(dsn, **options)) for _ in range(count)]


def query(dsn: str, statement: LiteralString, *parameters: Any) -> list[Any]:
    """Run a statement in the schema on another connection, outside any transaction; its rows."""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=mcp_events") as connection:
        cursor = connection.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


async def open_session(store: PostgresStore, *, owner: str | None = None) -> tuple[SessionKey, OpenedSession]:
    """A session whose `initialize` is answered."""
    key = SessionKey(uuid4().hex, "server", owner, None)
    opened = await store.log.open_session(
        key, initialize="{}", protocol_version=VERSION, request_id="0", request_key="i0", limit=None
    )
    await store.log.append(opened.stream, RESULT, final=True)
    return key, opened


async def open_call(store: PostgresStore, key: SessionKey, number: int = 1) -> Stream:
    """The stream of a request that `store` runs."""
    call = await store.log.open_stream(
        key, request_id=str(number), request_key=f"i{number}", method="tools/call", restore=False
    )
    return call.stream


def standalone(key: SessionKey, opened: OpenedSession) -> Stream:
    """The session's standalone stream, as each worker has an object of its own for it."""
    return Stream(opened.standalone, key.session_id, shared=True)


def numbered(caller: object, index: int, *, final: bool = False) -> bytes:
    """A payload that says whose it is."""
    return json.dumps({"caller": str(caller), "index": index, "result" if final else "method": ""}).encode()


def stored(dsn: str, stream: int) -> list[tuple[int, bytes]]:
    """What a stream holds, in the order of its numbers."""
    return [
        (seq, payload.encode())
        for seq, payload in query(dsn, "SELECT seq, payload FROM events WHERE stream = %s ORDER BY seq", stream)
    ]


def assert_streams_are_whole(dsn: str) -> None:
    """Invariant 1 for every stream: numbers 1, 2, 3 and so on, at most one final, and nothing after it."""
    rows = query(
        dsn,
        """
        SELECT t.number, t.final_seq, t.request_key IS NULL,
               array_agg(e.seq ORDER BY e.seq, e.created_at),
               array_agg(e.seq ORDER BY e.seq) FILTER (WHERE e.payload ~ '"(result|error)"')
          FROM streams t JOIN events e ON e.stream = t.number GROUP BY t.number
        """,
    )
    assert rows
    for number, final_seq, is_standalone, seqs, finals in rows:
        assert seqs == list(range(1, len(seqs) + 1)), f"stream {number} has the numbers {seqs}"
        if final_seq is not None:
            assert final_seq == len(seqs), f"stream {number} ended with {final_seq} and goes on to {len(seqs)}"
        if not is_standalone:
            assert finals == ([final_seq] if final_seq else None), f"stream {number}: finals {finals}, not {final_seq}"


# Invariant 1: contiguous, commit order is number order, one final and nothing after it


async def test_numbers_of_a_shared_stream_become_visible_in_their_order(migrated: str) -> None:
    async with running(migrated, 3) as stores:
        key, opened = await open_session(stores[0])

        async def work(store: PostgresStore, caller: int) -> None:
            stream = standalone(key, opened)
            for index in range(60):
                await store.log.append(stream, numbered(caller, index))

        def poll(done: asyncio.Event) -> int:
            seen = 0
            with psycopg.connect(migrated, autocommit=True) as connection:
                while not done.is_set() or seen < 3 * 5 * 60:
                    statement = "SELECT seq FROM mcp_events.events WHERE stream = %s AND seq > %s ORDER BY seq"
                    seqs = [seq for (seq,) in connection.execute(statement, (opened.standalone, seen)).fetchall()]
                    assert seqs == list(range(seen + 1, seen + 1 + len(seqs)))
                    seen += len(seqs)
            return seen

        done = asyncio.Event()
        poller = asyncio.create_task(asyncio.to_thread(poll, done))
        try:
            await asyncio.gather(*(work(store, caller) for store in stores for caller in range(5)))
        finally:
            done.set()
        assert await asyncio.wait_for(poller, 10) == 900
    assert_streams_are_whole(migrated)


async def test_callers_of_one_worker_keep_their_order_in_a_shared_stream(migrated: str) -> None:
    async with running(migrated, 2) as stores:
        key, opened = await open_session(stores[0])

        async def work(store: PostgresStore, caller: int) -> list[tuple[int, bytes]]:
            stream = standalone(key, opened)
            payloads = [numbered(caller, index) for index in range(40)]
            seqs = await asyncio.gather(*(store.log.append(stream, payload) for payload in payloads))
            assert seqs == sorted(seqs)
            return list(zip(seqs, payloads, strict=True))

        found = await asyncio.gather(*(work(store, caller) for caller, store in enumerate(stores * 3)))
    assert sorted(sum(found, [])) == stored(migrated, opened.standalone)


async def test_workers_that_write_to_the_same_streams_never_deadlock(migrated: str) -> None:
    async with running(migrated, 3) as stores:
        sessions = [await open_session(stores[0]) for _ in range(12)]

        async def work(store: PostgresStore, seed: int) -> None:
            streams = [standalone(key, opened) for key, opened in sessions]
            for _ in range(40):
                random.Random(seed).shuffle(streams)
                seed += 1
                await asyncio.gather(*(store.log.append(stream, NOTE) for stream in streams))

        await asyncio.gather(*(work(store, 1000 * place) for place, store in enumerate(stores)))
    query(migrated, "SELECT pg_stat_force_next_flush()") if server_version(migrated) >= 150000 else None
    assert query(migrated, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]
    assert_streams_are_whole(migrated)


def server_version(dsn: str) -> int:
    return int(query(dsn, "SHOW server_version_num")[0][0])


async def write_until_refused(store: PostgresStore, stream: Stream, acknowledged: set[tuple[int, int]]) -> None:
    """Append until somebody ends the stream, noting what was acknowledged."""
    with contextlib.suppress(Error):
        while True:
            acknowledged.add((stream.number, await store.log.append(stream, NOTE)))


async def finish_soon(store: PostgresStore, stream: Stream, acknowledged: set[tuple[int, int]]) -> None:
    """A few events, and then the result: the final that races with somebody else's."""
    with contextlib.suppress(Error):
        for final in (False, False, True):
            acknowledged.add((stream.number, await store.log.append(stream, RESULT if final else NOTE, final=final)))


def assert_acknowledged_is_stored(dsn: str, acknowledged: set[tuple[int, int]]) -> None:
    assert acknowledged
    assert acknowledged <= {tuple(row) for row in query(dsn, "SELECT stream, seq FROM events")}


async def test_a_session_that_ends_elsewhere_races_with_appends(migrated: str) -> None:
    acknowledged: set[tuple[int, int]] = set()
    async with running(migrated, 2) as (here, there):
        lasting_key, _ = await open_session(here)
        lasting = await open_call(here, lasting_key)
        others = asyncio.create_task(write_until_refused(here, lasting, acknowledged))

        async def race(seed: int) -> None:
            key, opened = await open_session(here)
            streams = [await open_call(here, key, number) for number in range(1, 4)]
            work = [
                asyncio.create_task(write_until_refused(here, streams[0], acknowledged)),
                asyncio.create_task(write_until_refused(there, standalone(key, opened), acknowledged)),
                *(asyncio.create_task(finish_soon(here, stream, acknowledged)) for stream in streams[1:]),
            ]
            await asyncio.sleep(random.Random(seed).uniform(0, 0.006))
            await there.log.end_session(key, "deleted")
            await asyncio.wait_for(asyncio.gather(*work), 10)

        for start in range(0, 300, 10):
            await asyncio.gather(*(race(seed) for seed in range(start, start + 10)))
        # Other sessions of the same worker are none the wiser.
        assert not others.done()
        assert not lasting.closed
        await here.log.append(lasting, RESULT, final=True)
        await others
    assert_streams_are_whole(migrated)
    assert_acknowledged_is_stored(migrated, acknowledged)
    assert query(migrated, "SELECT count(*) FROM streams WHERE final_seq IS NULL AND request_key IS NOT NULL") == [(0,)]


async def renewed(store: PostgresStore, old: int) -> None:
    """Return when a worker that was declared dead has taken its new number and left nothing open under the old one."""
    worker = parts(store)
    worker.writer.declared_dead()
    assert worker._renewal is not None
    await asyncio.wait_for(asyncio.shield(worker._renewal), 10)
    assert worker.identity.number != old


async def test_a_worker_that_is_declared_dead_races_with_its_appends(migrated: str) -> None:
    acknowledged: set[tuple[int, int]] = set()
    async with running(migrated, 3) as (watcher, *victims):
        key, opened = await open_session(watcher)

        async def race(victim: PostgresStore, seed: int) -> None:
            number = victim.worker_number()
            first = seed * 10
            streams = [await open_call(victim, key, first + place) for place in range(4)]
            work = [
                asyncio.create_task(write_until_refused(victim, streams[0], acknowledged)),
                asyncio.create_task(write_until_refused(victim, standalone(key, opened), acknowledged)),
                *(asyncio.create_task(finish_soon(victim, stream, acknowledged)) for stream in streams[1:]),
            ]
            await asyncio.sleep(random.Random(seed).uniform(0, 0.004))
            reaped = await asyncio.gather(
                *(parts(watcher).finisher.reap(number, "worker_lost", grace=0, unresponsive=0) for _ in range(2))
            )
            assert sorted(reaped) == [False, True], "two reapers at once"
            await asyncio.wait_for(asyncio.gather(*work), 10)
            await renewed(victim, number)

        for seed in range(0, 200, 2):
            await asyncio.gather(*(race(victim, seed + place) for place, victim in enumerate(victims)))
    assert_streams_are_whole(migrated)
    assert_acknowledged_is_stored(migrated, acknowledged)
    assert query(migrated, "SELECT count(*) FROM streams WHERE final_seq IS NULL AND request_key IS NOT NULL") == [(0,)]


async def test_reaping_twice_changes_nothing(migrated: str) -> None:
    async with running(migrated, 2) as (watcher, victim):
        key, _ = await open_session(watcher)
        stream = await open_call(victim, key)
        await victim.log.append(stream, NOTE)
        number = victim.worker_number()
        assert await parts(watcher).finisher.reap(number, "worker_lost", grace=0, unresponsive=0)
        before = stored(migrated, stream.number)
        assert json.loads(before[-1][1]) == {
            "jsonrpc": "2.0",
            "id": 1,
            "error": {
                "code": -32000,
                "message": "The worker running this request is gone",
                "data": {"reason": "worker_lost"},
            },
        }
        assert not await parts(watcher).finisher.reap(number, "worker_lost", grace=0, unresponsive=0)
        assert stored(migrated, stream.number) == before
        await renewed(victim, number)


async def test_a_worker_that_lives_is_not_reaped(migrated: str) -> None:
    async with running(migrated, 2) as (watcher, other):
        assert await parts(watcher).finisher.suspects(0, 60) == []
        assert not await parts(watcher).finisher.reap(other.worker_number(), "worker_lost", grace=0, unresponsive=60)


async def test_nothing_follows_a_final(migrated: str) -> None:
    async with running(migrated, 2) as (store, other):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        outcomes = await asyncio.gather(
            store.log.append(stream, NOTE),
            store.log.append(stream, RESULT, final=True),
            store.log.append(stream, NOTE),
            store.log.append(stream, RESULT, final=True),
            return_exceptions=True,
        )
        assert outcomes[:2] == [1, 2]
        assert [type(outcome) for outcome in outcomes[2:]] == [AppendRefused, AppendRefused]
        # A shared one: the two workers, and two objects of one worker, know nothing of each other.
        named, _ = await store.log.named_stream(key.session_id, '"n"', "nn", adopt=False)
        twin, _ = await store.log.named_stream(key.session_id, '"n"', "nn", adopt=False)
        far, _ = await other.log.named_stream(key.session_id, '"n"', "nn", adopt=False)
        assert named.number == twin.number == far.number
        assert await store.log.append(named, RESULT, final=True) == 1
        for late, log in ((twin, store.log), (far, other.log)):
            with pytest.raises(AppendRefused):
                await log.append(late, NOTE)
    assert_streams_are_whole(migrated)


async def test_nothing_follows_a_final_within_one_flush(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        streams = [(await store.log.named_stream(key.session_id, '"n"', "nn", adopt=False))[0] for _ in range(3)]
        outcomes = await asyncio.gather(
            store.log.append(streams[0], RESULT, final=True),
            store.log.append(streams[1], NOTE),
            store.log.append(streams[2], RESULT, final=True),
            return_exceptions=True,
        )
    assert stored(migrated, streams[0].number) == [(1, RESULT)], outcomes
    assert [type(outcome) for outcome in outcomes] == [int, AppendRefused, AppendRefused]


async def test_a_request_id_in_flight_is_refused_on_every_worker(migrated: str) -> None:
    async with running(migrated, 2) as (store, other):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        for log in (store, other):
            with pytest.raises(RequestInFlight):
                await open_call(log, key)
        await store.log.append(stream, RESULT, final=True)
        assert (await open_call(other, key)).number != stream.number


# Invariant 2: delivered only after the commit


async def test_the_hub_delivers_nothing_that_another_connection_cannot_see_yet(migrated: str) -> None:
    async with running(migrated, 2) as (store, other):
        key, opened = await open_session(store)
        delivered: list[int] = []
        unseen: list[tuple[int, int]] = []
        with psycopg.connect(migrated, autocommit=True) as connection:

            def publish(stream: int, event: Event) -> None:
                # In the event loop on purpose: nothing of the store may go on before this has looked.
                statement = "SELECT FROM mcp_events.events WHERE stream = %s AND seq = %s"
                if connection.execute(statement, (stream, event.seq)).fetchone() is None:
                    unseen.append((stream, event.seq))
                delivered.append(event.seq)

            for each in (store, other):
                parts(each).hub.publish = publish  # type: ignore[method-assign]
            streams = [await open_call(store, key, number) for number in range(1, 11)]

            async def work(log: PostgresStore, stream: Stream) -> None:
                for index in range(20):
                    seq = await log.log.append(stream, NOTE, final=index == 19 and not stream.shared)
                    assert seq in delivered, "acknowledged before it was delivered"

            shared = [(each, standalone(key, opened)) for each in (store, other)]
            await asyncio.gather(*(work(*each) for each in [*shared, *((store, stream) for stream in streams)]))
        assert len(delivered) == 12 * 20
        assert unseen == []


# Invariant 5: no notification without a remote reader


async def channels_of(stores: Iterable[PostgresStore]) -> list[str]:
    return [f"{parts(store).waker._prefix}{store.worker_number()}" for store in stores]


async def heard(connection: psycopg.AsyncConnection[Any], sender: PostgresStore) -> list[str]:
    """What the channels got since the last call, apart from the listeners' own pings."""
    await asyncio.wait_for(parts(sender).waker._announced.wait(), 5)
    await connection.execute("SELECT pg_notify('sentinel', '')")
    payloads = []
    async for notification in connection.notifies(timeout=5):
        if notification.channel == "sentinel":
            return payloads
        if notification.payload != "p":
            payloads.append(notification.payload)
    raise AssertionError("The sentinel did not come.")


async def test_only_a_remote_reader_costs_a_notification(migrated: str) -> None:
    async with (
        running(migrated, 2) as (store, other),
        await psycopg.AsyncConnection.connect(migrated, autocommit=True) as side,
    ):
        for channel in ["sentinel", *await channels_of((store, other))]:
            await side.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
        key, opened = await open_session(store)
        local = await open_call(store, key, 1)
        shared = standalone(key, opened)
        for _ in range(20):
            await asyncio.gather(store.log.append(local, NOTE), store.log.append(shared, NOTE))
        assert await heard(side, store) == []
        assert parts(store).waker.sent == 0

        # A second stream of the same worker gets a reader elsewhere: it alone is announced.
        remote = await open_call(store, key, 2)
        await other.log.attach(key, remote.number, 0, patience=1)
        assert await heard(side, store) == [f"k{remote.number}:2"]
        await asyncio.gather(store.log.append(local, NOTE), store.log.append(remote, NOTE))
        assert await heard(side, store) == [f"s{remote.number}"]

        # What one flush stores is one notification, and what has no payloads in it.
        streams = [await open_call(store, key, number) for number in range(3, 103)]
        for stream in streams:
            await other.log.attach(key, stream.number, 0, patience=1)
        await heard(side, store)
        before = parts(store).waker.sent
        await asyncio.gather(*(store.log.append(stream, NOTE) for stream in streams for _ in range(5)))
        told = await heard(side, store)
        assert parts(store).waker.sent - before == len(told) <= 5
        assert {int(number) for payload in told for number in payload[1:].split(",")} == {s.number for s in streams}

        # The reader comes home, and it is quiet again.
        home = await store.log.attach(key, remote.number, 0, patience=1)
        await heard(side, store)
        await store.log.append(remote, NOTE)
        assert await heard(side, store) == []
        await store.log.detach(remote.number, home.generation, 3)
        await store.log.append(remote, NOTE)
        assert await heard(side, store) == []


async def test_a_reader_that_attaches_during_an_append_misses_nothing(migrated: str) -> None:
    """Who reads is looked up after the commit: an attach in between sees the event in the log, or is woken."""
    async with running(migrated, 2) as (store, other):
        key, _ = await open_session(store)
        for number in range(1, 101):
            stream = await open_call(store, key, number)

            async def attach_and_read(stream: Stream = stream) -> bytes:
                await asyncio.sleep(random.Random(stream.number).uniform(0, 0.003))
                held = await other.log.attach(key, stream.number, 0, patience=1)
                subscription = other.hub.subscribe(stream.number, key.session_id, held.generation)
                try:
                    while True:
                        page = await other.log.read(stream.number, 0, held.bound)
                        if page.events:
                            return page.events[0].payload
                        subscription.behind = False
                        assert await subscription.wait(3), f"stream {stream.number}: neither in the log nor woken"
                finally:
                    other.hub.unsubscribe(subscription)

            reader = asyncio.create_task(attach_and_read())
            await store.log.append(stream, NOTE)
            assert await reader == NOTE


# Invariant 7: restorable before the id is handed out


async def ask(app: Any, message: dict[str, Any], on_start: Callable[[dict[bytes, bytes]], Awaitable[None]]) -> int:
    """POST a message to an ASGI app; `on_start` runs when the response's headers leave it. The status."""
    body = json.dumps(message).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(event: dict[str, Any]) -> None:
        nonlocal status
        if event["type"] == "http.response.start":
            status = event["status"]
            await on_start(dict(event["headers"]))

    headers = [
        (b"host", b"127.0.0.1:80"),
        (b"content-type", b"application/json"),
        (b"accept", b"application/json, text/event-stream"),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/mcp",
        "raw_path": b"/mcp",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    return status


def initialize(version: str = VERSION) -> dict[str, Any]:
    client = {"name": "client", "version": "1"}
    params = {"protocolVersion": version, "capabilities": {"sampling": {}}, "clientInfo": client}
    return {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}


async def test_a_session_can_be_restored_when_its_id_leaves_the_process(migrated: str) -> None:
    store, other = PostgresStore(migrated), PostgresStore(migrated)
    app = durable(Server("restorable").streamable_http_app(), store)
    restored: list[str] = []
    async with other, app.router.lifespan_context(app):

        async def on_start(headers: dict[bytes, bytes]) -> None:
            key = SessionKey(headers[b"mcp-session-id"].decode(), "restorable", None, None)
            call = await other.log.open_stream(key, request_id="2", request_key="i2", method="ping", restore=True)
            assert call.record is not None
            assert json.loads(call.record.initialize)["capabilities"] == {"sampling": {}}
            assert call.record.protocol_version == VERSION
            held = await other.log.attach(key, None, None, patience=1)
            assert held.stream == call.record.standalone
            restored.append(key.session_id)

        for _ in range(5):
            assert await ask(app, initialize(), on_start) == 200
    assert len(set(restored)) == 5


async def test_a_session_that_cannot_be_recorded_gives_out_no_id(migrated: str) -> None:
    store = PostgresStore(migrated)
    app = durable(Server("restorable").streamable_http_app(), store)
    async with app.router.lifespan_context(app):
        query(migrated, "ALTER TABLE sessions RENAME TO gone")
        heads: list[dict[bytes, bytes]] = []

        async def on_start(headers: dict[bytes, bytes]) -> None:
            heads.append(headers)

        assert await ask(app, initialize(), on_start) in (500, 503)
        assert b"mcp-session-id" not in heads[0]
        query(migrated, "ALTER TABLE gone RENAME TO sessions")


async def test_a_session_is_its_owners_and_its_servers_alone(migrated: str) -> None:
    async with running(migrated, 2) as (store, other):
        key, opened = await open_session(store, owner="ann")
        for stranger in (
            SessionKey(key.session_id, key.server, "bob", None),
            SessionKey(key.session_id, key.server, None, None),
            SessionKey(key.session_id, "another", key.owner, None),
            SessionKey("unknown", key.server, key.owner, None),
        ):
            for log in (store.log, other.log):
                with pytest.raises(SessionUnknown):
                    await log.find_session(stranger)
                with pytest.raises(SessionUnknown):
                    await log.attach(stranger, opened.stream.number, 0, patience=1)
                with pytest.raises(SessionUnknown):
                    await log.end_session(stranger, "deleted")
            with pytest.raises(SessionUnknown):
                await open_call(other, stranger)
        assert (await other.log.find_session(key)).standalone == opened.standalone


# The partition of the present is missing


def drop_partitions(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        names = connection.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'mcp_events.events'::regclass"
        ).fetchall()
        for (name,) in names:
            connection.execute(psycopg.sql.SQL("DROP TABLE {}").format(psycopg.sql.SQL(name)))


@pytest.fixture(params=["owner", "least privileges"])
def any_role(request: pytest.FixtureRequest, migrated: str) -> Any:
    """The DSN of the owner of the tables, and of a role that can do no more than a worker has to."""
    if request.param == "owner":
        yield migrated
        return
    name = "least " + migrated.rpartition("_")[2]
    role = psycopg.sql.Identifier(name)
    with psycopg.connect(migrated, autocommit=True) as admin:
        admin.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'of the worker'").format(role))
        migrate.upgrade(migrated, worker_role=name)
        yield make_conninfo(migrated, user=name, password="of the worker")
        admin.execute(psycopg.sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))


async def test_an_append_makes_the_partition_that_is_missing(migrated: str, any_role: str) -> None:
    async with running(any_role, 2) as stores:
        key, opened = await open_session(stores[0])
        streams = [await open_call(store, key, number) for number, store in enumerate(stores, 1)]
        for _ in range(3):
            # Every event so far goes with them: the numbers go on all the same, since they are in memory or in a row.
            drop_partitions(migrated)
            work = [(store, target) for store in stores for target in (standalone(key, opened),)]
            work += list(zip(stores, streams, strict=True))
            await asyncio.gather(*(store.log.append(stream, NOTE) for store, stream in work for _ in range(5)))
        assert [seq for seq, _ in stored(migrated, streams[0].number)] == [11, 12, 13, 14, 15]
        assert [seq for seq, _ in stored(migrated, opened.standalone)] == list(range(21, 31))
        for store, stream in zip(stores, streams, strict=True):
            await store.log.append(stream, RESULT, final=True)
    (count,) = query(migrated, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'events'::regclass")
    assert count == (3,)


async def test_a_worker_that_starts_makes_the_partitions_of_the_near_future(migrated: str, any_role: str) -> None:
    drop_partitions(migrated)
    async with running(any_role, 1):
        (count,) = query(migrated, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'events'::regclass")
    assert count == (3,)
