"""A worker knows which of its calls are read elsewhere, and asks the database about no other (invariants 5 and 16)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mcp_pg_events import PostgresStore
from tests.integration.test_listener import response
from tests.support.log import NOTE, RESULT, open_call, open_session, parts, query, running, standalone, until

pytestmark = pytest.mark.anyio


def count_look_ups(store: PostgresStore) -> list[list[int]]:
    """The streams of each look-up to come."""
    waker, looked = parts(store).waker, []
    announce = waker._announce

    async def counted(batch: list[int]) -> None:
        looked.append(batch)
        await announce(batch)

    waker._announce = counted  # type: ignore[method-assign]
    return looked


def hold_back_attachments(store: PostgresStore) -> list[str]:
    """Notifications of attachments that arrive from now on, which this worker does not hear."""
    held: list[str] = []
    listener = parts(store).listener
    hear = listener._on_notification

    def hear_the_rest(payload: str) -> None:
        if payload.startswith("a"):
            held.append(payload)
        else:
            hear(payload)

    listener._on_notification = hear_the_rest
    return held


async def quiet(store: PostgresStore) -> None:
    await asyncio.wait_for(parts(store).waker._announced.wait(), 5)


async def test_only_what_is_read_elsewhere_is_looked_up_after_a_commit(migrated: str) -> None:
    async with running(migrated, 2) as (store, other):
        looked = count_look_ups(store)
        key, opened = await open_session(store)
        stream, local = await open_call(store, key, 1), await open_call(store, key, 2)
        await asyncio.gather(store.log.append(stream, NOTE), store.log.append(local, NOTE))
        assert looked == []

        await other.log.attach(key, stream.number, 0, patience=1)
        await until(lambda: looked == [[stream.number]])
        await asyncio.gather(store.log.append(stream, NOTE), store.log.append(local, NOTE))
        await quiet(store)
        assert looked == [[stream.number]] * 2

        # It comes home; what had been sent of the older attachment changes nothing any more.
        home = await store.log.attach(key, stream.number, 0, patience=1)
        parts(store)._notified(f"a{stream.number}:{home.generation - 1}")
        await quiet(store)
        looked.clear()
        await store.log.append(stream, NOTE)
        assert looked == []

        # The standalone stream has several writers, and none of them is told.
        await store.log.append(standalone(key, opened), NOTE)
        await quiet(store)
        assert looked == [[opened.standalone]]


@pytest.mark.parametrize("final", [False, True])
async def test_what_was_stored_before_the_owner_heard_of_a_reader_wakes_it_then(migrated: str, final: bool) -> None:
    async with running(migrated, 2) as (store, other):
        held = hold_back_attachments(store)
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        async with response(other, key, stream.number) as client:
            await until(lambda: held and client.items)
            await quiet(store)
            await until(lambda: not other.hub._subscriptions[stream.number].behind)
            await store.log.append(stream, RESULT if final else NOTE, final=final)
            assert client.seqs == []
            parts(store)._notified(held[0])
            await client.until(1)
            if not final:
                await store.log.append(stream, RESULT, final=True)
                await client.until(2)


async def test_a_worker_that_was_deaf_looks_after_every_call_again(migrated: str) -> None:
    async with running(migrated, 2) as (store, other):
        held = hold_back_attachments(store)
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        async with response(other, key, stream.number) as client:
            await until(lambda: held and client.items)
            await store.log.append(stream, NOTE)
            up_since = parts(store).listener.up_since
            parts(store).listener._drop()
            await until(lambda: parts(store).listener.up_since not in (None, up_since))
            await client.until(1)
            await store.log.append(stream, RESULT, final=True)
            await client.until(2)


async def test_an_owner_hears_of_readers_on_workers_of_an_older_release(migrated: str) -> None:
    """They attach with a statement that knows nothing of it."""
    async with running(migrated, 1) as (store,):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        attach = "UPDATE streams SET reader_worker = %s, reader_generation = reader_generation + 1 WHERE number = %s"
        query(migrated, attach, store.worker_number() + 1, stream.number)
        await until(lambda: stream.read_elsewhere)


async def test_a_lost_word_of_a_reader_only_delays_until_it_polls(migrated: str) -> None:
    async with running(migrated, 2) as (store, other):
        held = hold_back_attachments(store)
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        options: dict[str, Any] = {"poll_interval": 0.1}
        async with response(other, key, stream.number, **options) as client:
            await until(lambda: held and client.items)
            await store.log.append(stream, NOTE)
            await client.until(1)
            await store.log.append(stream, RESULT, final=True)
            await client.until(2)
