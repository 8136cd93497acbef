"""Notifications that are lost, late or never come only delay (invariants 5 and 16), and the self-test that says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mcp_pg_events import PostgresStore, inbox, listener, watch
from mcp_pg_events.backend import App, SessionKey
from mcp_pg_events.errors import ListenUnavailable
from mcp_pg_events.reader import ReaderOptions, SSEReader
from tests.support.deaf_proxy import DeafProxy, dsn_through, target_of
from tests.support.log import (
    NOTE,
    RESULT,
    numbered,
    open_call,
    open_session,
    parts,
    query,
    running,
    standalone,
    stored,
    until,
)
from tests.support.postgres import PASSWORD
from tests.support.reading import NEVER, Client

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def response(store: PostgresStore, key: SessionKey, stream: int, **options: Any) -> AsyncIterator[Client]:
    """The client of a response that reads a stream from its beginning, as a GET on this worker does."""
    held = await store.log.attach(key, stream, 0, patience=1)
    subscription = store.hub.subscribe(held.stream, key.session_id, held.generation)
    subscription.fall_behind()
    reader = SSEReader(
        store.log,
        subscription,
        position=held.position,
        bound=held.bound,
        primes=True,
        options=ReaderOptions(**{"keep_alive": NEVER, "poll_interval": NEVER, **options}),
    )
    client = Client()
    task = asyncio.create_task(reader.respond(client.receive, client.send, []))
    try:
        yield client
        await asyncio.wait_for(task, 10)
        assert client.ended_cleanly
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        store.hub.unsubscribe(subscription)


@contextlib.asynccontextmanager
async def behind_a_deaf_proxy(dsn: str, **options: Any) -> AsyncIterator[tuple[PostgresStore, DeafProxy]]:
    """A store that listens through a proxy that may lose its notifications, and does all else without it."""
    async with DeafProxy.to(*target_of(dsn)) as proxy:
        assert isinstance(proxy, DeafProxy)
        async with PostgresStore(dsn, listen_dsn=dsn_through(proxy, dsn), **options) as store:
            yield store, proxy


def end_listening_connections(dsn: str) -> int:
    """End every connection that holds a worker's lock; how many."""
    statement = """
        SELECT pg_terminate_backend(pid, 5000) FROM pg_locks
         WHERE locktype = 'advisory' AND granted
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    """
    return len(query(dsn, statement))


async def test_a_listening_connection_that_is_ended_again_and_again_in_mid_call_loses_nothing(
    migrated_once: str,
) -> None:
    """No reader polls here: what was notified meanwhile arrives since a new connection wakes every local reader."""
    async with running(migrated_once, 2) as (store, other):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        async with response(other, key, stream.number) as client:
            for index in range(1, 6):
                assert end_listening_connections(migrated_once) >= 2
                for _ in range(10):
                    await store.log.append(stream, numbered(0, index))
                await client.until(10 * index)
                await until(lambda: all(parts(each).listener.up_since is not None for each in (store, other)))
            await store.log.append(stream, RESULT, final=True)
        assert client.seqs == [seq for seq, _ in stored(migrated_once, stream.number)] == list(range(1, 52))
        # Nobody was declared dead for it.
        numbers = [store.worker_number(), other.worker_number()]
        assert (
            query(migrated_once, "SELECT 1 FROM workers WHERE number = ANY(%s) AND ended_at IS NOT NULL", numbers) == []
        )


async def test_lost_notifications_delay_by_the_poll_interval_and_no_more(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,), behind_a_deaf_proxy(migrated_once) as (other, proxy):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        async with response(other, key, stream.number, poll_interval=0.2) as client:
            await store.log.append(stream, NOTE)
            await client.until(1)
            proxy.deaf = True
            for seq in range(2, 5):
                await store.log.append(stream, NOTE)
                await client.until(seq)
            await store.log.append(stream, RESULT, final=True)
        assert client.seqs == [1, 2, 3, 4, 5]
        assert proxy.lost >= 3, "they came by another way"


async def test_an_older_reader_finds_out_that_there_is_a_newer_one_though_nobody_could_tell(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,), behind_a_deaf_proxy(migrated_once) as (other, proxy):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        async with response(other, key, stream.number, poll_interval=0.2) as client:
            proxy.deaf = True
            await store.log.attach(key, stream.number, 0, patience=1)
            await store.log.append(stream, NOTE)
        assert client.seqs == [], "it went on for its successor"
        assert proxy.lost >= 1


async def test_a_letter_whose_announcement_is_lost_only_comes_later(
    migrated_once: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "POLL_INTERVAL", 0.2)
    async with running(migrated_once, 1) as (store,), behind_a_deaf_proxy(migrated_once) as (other, proxy):
        letters: list[tuple[str, str]] = []

        def receive(session_id: str, payload: str, stream: object) -> bool:
            letters.append((session_id, payload))
            return True

        leave = other.register(App(receive, lambda session_id: None, lambda session_id: None, lambda: None))
        proxy.deaf = True
        for number in range(3):
            assert await store.log.post([other.worker_number()], "session", str(number)) == 1
        await until(lambda: len(letters) == 3)
        assert letters == [("session", str(number)) for number in range(3)]
        leave()


async def test_a_call_learns_that_its_session_ended_though_nobody_could_tell(
    migrated_once: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that sends nothing would otherwise work for nobody, for as long as it likes (invariant 8)."""
    monkeypatch.setattr(watch, "STAMP_INTERVAL", 0.2)
    async with running(migrated_once, 1) as (store,), behind_a_deaf_proxy(migrated_once) as (other, proxy):
        key, _ = await open_session(store)
        stream = await open_call(other, key)
        ended = asyncio.Event()
        stream.on_ended = ended.set
        proxy.deaf = True
        await store.log.end_session(key, "deleted")
        await asyncio.wait_for(ended.wait(), 10)


async def test_what_another_worker_wrote_in_between_is_delivered_in_its_place(migrated_once: str) -> None:
    """The standalone stream: this worker's own events come at once, the notifications of the other's are lost."""
    async with running(migrated_once, 1) as (store,), behind_a_deaf_proxy(migrated_once) as (other, proxy):
        key, opened = await open_session(store)
        proxy.deaf = True
        async with response(other, key, opened.standalone) as client:
            for index in range(12):
                writer = store if index % 3 else other
                await writer.log.append(standalone(key, opened), numbered(writer.worker_number(), index))
            await other.log.append(standalone(key, opened), NOTE)
            await client.until(13)
            assert client.seqs == list(range(1, 14))
            other.hub.end_stream(opened.standalone, "closed")


async def test_a_connection_that_has_gone_deaf_is_found_out_and_replaced(
    migrated_once: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "PING_INTERVAL", 0.05)
    monkeypatch.setattr(listener, "PING_TIMEOUT", 0.3)
    async with running(migrated_once, 1) as (store,), behind_a_deaf_proxy(migrated_once) as (other, proxy):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        async with response(other, key, stream.number) as client:
            before = proxy.accepted
            proxy.deaf = True
            await store.log.append(stream, NOTE)
            await until(lambda: proxy.accepted > before)
            # Still deaf: but a new connection wakes every reader.
            await client.until(1)
            proxy.deaf = False
            await store.log.append(stream, RESULT, final=True)
        assert client.seqs == [1, 2]
    assert "deaf" in caplog.text


async def test_a_path_on_which_listen_does_not_work_is_refused_at_the_start(
    migrated_once: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener, "PING_TIMEOUT", 0.2)
    async with DeafProxy.to(*target_of(migrated_once)) as proxy:
        assert isinstance(proxy, DeafProxy)
        proxy.deaf = True
        everything = PostgresStore(dsn_through(proxy, migrated_once))
        with pytest.raises(ListenUnavailable, match="listen_dsn") as refused:
            await everything.__aenter__()
        assert proxy.lost >= 1, "it was refused for another reason"
        assert PASSWORD not in str(refused.value) + caplog.text
        # As the sentence says: the same path will do for all but listening.
        async with PostgresStore(dsn_through(proxy, migrated_once), listen_dsn=migrated_once) as store:
            key, _ = await open_session(store)
            await store.log.append(await open_call(store, key), RESULT, final=True)
        await until(lambda: proxy.connections == 0)


async def test_a_worker_that_gets_a_new_number_while_it_cannot_listen_listens_under_the_new_one(
    migrated_once: str,
) -> None:
    async with running(migrated_once, 1) as (store,), behind_a_deaf_proxy(migrated_once) as (other, proxy):
        key, _ = await open_session(store)
        # It connects: the database has accepted, and says nothing yet.
        proxy.freeze()
        proxy.cut()
        await proxy.holding()
        old = other.worker_number()
        parts(other).writer.declared_dead()
        await proxy.restore()
        proxy.thaw()
        await until(lambda: other.worker_number() != old and not parts(other).writer.lost)
        lock = "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND granted AND objid = %s"
        await until(lambda: query(migrated_once, lock, other.worker_number()))
        stream = await open_call(store, key)
        async with response(other, key, stream.number) as client:
            await store.log.append(stream, NOTE)
            await client.until(1)
            await store.log.append(stream, RESULT, final=True)
        assert client.seqs == [1, 2]
