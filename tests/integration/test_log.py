"""The log over PostgreSQL: numbers, finals, delivery after the commit, notifications (invariants 1, 2, 5 and 10)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable
from typing import Any

import psycopg
import pytest

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import Attachment, Event, RequestInFlight, SessionKey, Stream
from mcp_pg_events.errors import AppendRefused
from tests.support.log import (
    NOTE,
    RESULT,
    assert_no_deadlocks,
    assert_streams_are_whole,
    numbered,
    open_call,
    open_session,
    parts,
    running,
    standalone,
    stored,
    until,
)

pytestmark = pytest.mark.anyio


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
                until = time.monotonic() + 30
                while (not done.is_set() or seen < 3 * 5 * 60) and time.monotonic() < until:
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
    assert sorted(pair for pairs in found for pair in pairs) == stored(migrated, opened.standalone)


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
    assert_no_deadlocks(migrated)
    assert_streams_are_whole(migrated)


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


async def attach_elsewhere(other: PostgresStore, key: SessionKey, stream: Stream) -> Attachment:
    """Attach a reader, and wait until the stream's owner has heard of it."""
    held = await other.log.attach(key, stream.number, 0, patience=1)
    await until(lambda: stream.read_elsewhere)
    return held


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
        await attach_elsewhere(other, key, remote)
        assert await heard(side, store) == [f"k{remote.number}:2", f"a{remote.number}:2", f"s{remote.number}"]
        await asyncio.gather(store.log.append(local, NOTE), store.log.append(remote, NOTE))
        assert await heard(side, store) == [f"s{remote.number}"]

        # What one flush stores is one notification, and what has no payloads in it.
        streams = [await open_call(store, key, number) for number in range(3, 103)]
        for stream in streams:
            await attach_elsewhere(other, key, stream)
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

        # It goes elsewhere once more, and then away.
        away = await attach_elsewhere(other, key, remote)
        await heard(side, store)
        await store.log.detach(remote.number, home.generation, 3)
        await store.log.append(remote, NOTE)
        assert await heard(side, store) == [f"s{remote.number}"], "an older reader's going is not its going"
        await other.log.detach(remote.number, away.generation, 4)
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
