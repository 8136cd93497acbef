"""Sessions in the log, restorable and nobody else's (invariants 7 and 9), and partitions that are missing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from mcp.server.lowlevel import Server

from mcp_pg_events import PostgresStore, durable, migrate
from mcp_pg_events.backend import CursorRejected, SessionKey, SessionUnknown
from tests.support.asgi import ask, initialize
from tests.support.log import (
    NOTE,
    RESULT,
    VERSION,
    drop_partitions,
    open_call,
    open_session,
    query,
    running,
    standalone,
    stored,
)
from tests.support.roles import login_role

pytestmark = pytest.mark.anyio


# Invariant 7: restorable before the id is handed out


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


@pytest.fixture(params=["owner", "least privileges"])
def any_role(request: pytest.FixtureRequest, migrated: str) -> Any:
    """The DSN of the owner of the tables, and of a role that can do no more than a worker has to."""
    if request.param == "owner":
        yield migrated
        return
    with login_role(migrated) as (role, dsn):
        migrate.upgrade(migrated, worker_role=role)
        yield dsn


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


async def test_numbers_go_on_after_what_left_with_its_partition(migrated: str) -> None:
    """`floor` takes the highest number of an open stream before its partition goes."""
    async with running(migrated, 2) as (store, other):
        key, opened = await open_session(store)
        call = await open_call(store, key)
        named, _ = await store.log.named_stream(key.session_id, '"n"', "nn", adopt=False)
        for stream in (call, standalone(key, opened), named):
            for _ in range(3):
                await store.log.append(stream, NOTE)
        query(migrated, "UPDATE streams SET floor = 3 WHERE final_seq IS NULL")
        drop_partitions(migrated)
        assert await store.log.append(standalone(key, opened), NOTE) == 4
        await other.log.end_session(key, "deleted")
        for number in (call.number, named.number):
            ((seq, payload),) = stored(migrated, number)
            assert (seq, json.loads(payload)["error"]["data"]) == (4, {"reason": "session_ended"})


async def test_a_reader_learns_that_what_comes_next_is_gone(migrated: str) -> None:
    """It had attached before: a gap in silence would be the alternative (invariant 11)."""
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        for _ in range(3):
            await store.log.append(stream, NOTE)
        held = await store.log.attach(key, stream.number, 1, patience=1)
        query(migrated, "UPDATE streams SET floor = 3 WHERE number = %s", stream.number)
        drop_partitions(migrated)
        query(migrated, "SELECT ensure_partitions()")
        for _ in range(2):
            page = await store.log.read(stream.number, 1, held.bound)
            assert page.expired
            await store.log.append(stream, NOTE)
        page = await store.log.read(stream.number, 3, held.bound)
        assert (page.expired, [event.seq for event in page.events]) == (False, [4, 5])
        with pytest.raises(CursorRejected) as rejected:
            await store.log.attach(key, stream.number, 1, patience=1)
        assert rejected.value.reason == "expired"
