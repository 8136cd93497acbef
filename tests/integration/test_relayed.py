"""Streams of an upstream change their workers, and nothing is lost, doubled or left open (invariants 1, 8, 12)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from typing import Any
from uuid import uuid4

import psycopg
import pytest

from mcp_pg_events import PostgresStore, watch
from mcp_pg_events.backend import OpenedSession, SessionKey, SessionUnknown, Stream
from mcp_pg_events.errors import AppendRefused, DatabaseUnavailable, Error
from mcp_pg_events.finals import final_error
from tests.support.log import (
    NOTE,
    RESULT,
    VERSION,
    assert_no_deadlocks,
    assert_streams_are_whole,
    open_call,
    parts,
    query,
    running,
    stored,
    until,
)

pytestmark = pytest.mark.anyio


async def open_relayed(store: PostgresStore) -> tuple[SessionKey, OpenedSession]:
    """A session that an upstream calls `u`."""
    key = SessionKey(uuid4().hex, "server", None, None)
    opened = await store.log.open_session(
        key, initialize="{}", protocol_version=VERSION, request_id="0", request_key="i0", limit=None, upstream="u"
    )
    await store.log.append(opened.stream, RESULT, final=True)
    return key, opened


async def relayed(store: PostgresStore, stream: Stream, *ids: bytes | None) -> None:
    """Store an event for each id that the upstream gave."""
    for upstream_id in ids:
        if upstream_id is not None and stream.stored == 0:
            await store.relayed.note_id(stream, upstream_id)
        await (await store.log.enqueue(stream, NOTE, upstream_id=upstream_id))


async def die(store: PostgresStore, by: PostgresStore) -> None:
    """`store` is declared dead by another worker."""
    assert await parts(by).finisher.end_worker(store.worker_number(), "worker_lost")


async def test_a_dead_workers_stream_goes_on_after_the_last_event_that_it_stored(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, _ = await open_relayed(dead)
        stream = await open_call(dead, key)
        await relayed(dead, stream, b"a", b"b")
        assert await alive.relayed.claim(key, stream.number) is None, "it has a worker"
        assert await alive.relayed.adrift([stream.number]) == []
        await die(dead, alive)
        assert await alive.relayed.adrift([stream.number]) == [stream.number]
        claim = await alive.relayed.claim(key, stream.number)
        assert claim is not None
        assert (claim.request_id, claim.last_id, claim.fresh, claim.stream.next_seq) == (1, b"b", False, 3)
        with pytest.raises(Error):
            await dead.log.append(stream, NOTE)
        await relayed(alive, claim.stream, b"c")
        await alive.log.append(claim.stream, RESULT, final=True)
        assert await alive.relayed.claim(key, stream.number) is None, "it has ended"
    assert [seq for seq, _ in stored(migrated, stream.number)] == [1, 2, 3, 4]
    assert_streams_are_whole(migrated)


async def test_an_id_that_came_before_the_first_event_is_enough(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, _ = await open_relayed(dead)
        stream = await open_call(dead, key)
        await dead.relayed.note_id(stream, b"priming")
        await die(dead, alive)
        claim = await alive.relayed.claim(key, stream.number)
        assert claim is not None
        assert (claim.last_id, claim.fresh, claim.stream.next_seq) == (b"priming", True, 1)


async def test_an_event_without_an_id_is_nothing_to_go_on_from(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, _ = await open_relayed(dead)
        stream = await open_call(dead, key)
        await relayed(dead, stream, b"a", None)
        await die(dead, alive)
        claim = await alive.relayed.claim(key, stream.number)
        assert claim is not None
        assert (claim.last_id, claim.stream.next_seq) == (None, 3)


async def test_a_stream_without_ids_ends_with_its_worker_and_says_why(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, _ = await open_relayed(dead)
        stream = await open_call(dead, key)
        await relayed(dead, stream, None)
        await die(dead, alive)
        assert await alive.relayed.adrift([stream.number]) == []
        assert await alive.relayed.claim(key, stream.number) is None
    seq, payload = stored(migrated, stream.number)[-1]
    assert (seq, json.loads(payload)["error"]) == (2, final_error("upstream_lost"))
    assert_streams_are_whole(migrated)


async def test_a_worker_that_leaves_gives_its_streams_away_at_once(migrated: str) -> None:
    async with running(migrated, 2) as (leaving, staying):
        key, opened = await open_relayed(leaving)
        standing = await leaving.relayed.claim(key, opened.standalone)
        assert standing is not None and standing.request_id is None and standing.fresh
        await relayed(leaving, standing.stream, b"s")
        stream = await open_call(leaving, key)
        await relayed(leaving, stream, b"a")
        await leaving.relayed.release([stream, standing.stream])
        assert parts(leaving).writer.calls.numbers() == []
        with pytest.raises(AppendRefused):
            await leaving.log.append(stream, NOTE)
        for number, last in ((stream.number, b"a"), (opened.standalone, b"s")):
            claim = await staying.relayed.claim(key, number)
            assert claim is not None
            assert (claim.last_id, claim.stream.next_seq) == (last, 2)
        # And back, by the same worker.
        await staying.relayed.release([claim.stream])
        assert await leaving.relayed.claim(key, opened.standalone) is not None


async def test_one_worker_claims_a_stream_once_however_often_it_is_asked(migrated: str) -> None:
    async with running(migrated, 1) as (store,):
        key, opened = await open_relayed(store)
        for _ in range(20):
            claims = await asyncio.gather(*(store.relayed.claim(key, opened.standalone) for _ in range(3)))
            [claim] = [claim for claim in claims if claim is not None]
            await relayed(store, claim.stream, None)
            # Nor while it is on its way out.
            claims = await asyncio.gather(
                store.relayed.release([claim.stream]), store.relayed.claim(key, opened.standalone)
            )
            assert claims == [None, None]
            assert await store.relayed.adrift([opened.standalone]) == [opened.standalone]
    assert_streams_are_whole(migrated)


@pytest.mark.parametrize("lost", ["claim", "release"])
async def test_a_stream_whose_worker_is_in_doubt_is_left_to_others(
    lost: str, migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(migrated, 2) as (first, second):
        key, opened = await open_relayed(first)
        fetch = first.relayed._database.fetch
        doubted = first.relayed._queries.last_relayed if lost == "claim" else first.relayed._queries.release

        async def loses(statement: bytes, *arguments: Any, **options: Any) -> Any:
            if statement == doubted:
                raise DatabaseUnavailable
            return await fetch(statement, *arguments, **options)

        if lost == "release":
            claim = await first.relayed.claim(key, opened.standalone)
            assert claim is not None
        monkeypatch.setattr(first.relayed._database, "fetch", loses)
        with pytest.raises(DatabaseUnavailable):
            if lost == "claim":
                await first.relayed.claim(key, opened.standalone)
            else:
                await first.relayed.release([claim.stream])
        monkeypatch.undo()
        assert await second.relayed.claim(key, opened.standalone) is None
        await first.relayed.release_doubtful()
        assert await second.relayed.claim(key, opened.standalone) is not None
        await first.relayed.release_doubtful()
        assert await second.relayed.adrift([opened.standalone]) == []


async def test_a_claim_that_is_cancelled_while_it_waits_leaves_the_stream_to_others(migrated: str) -> None:
    async with running(migrated, 2) as (hasty, patient):
        key, opened = await open_relayed(hasty)
        with psycopg.connect(migrated, options="-c search_path=mcp_events") as blocking:
            blocking.execute("SELECT FROM streams WHERE number = %s FOR UPDATE", [opened.standalone])
            claiming = asyncio.create_task(hasty.relayed.claim(key, opened.standalone))
            waiting = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%claimed%%'"
            )
            await until(lambda: query(migrated, waiting) == [(1,)])
            claiming.cancel()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            releasing = asyncio.create_task(hasty.relayed.release_doubtful())
            await asyncio.sleep(0.1)
        await releasing
        assert await patient.relayed.claim(key, opened.standalone) is not None


async def test_what_went_with_its_partition_is_not_asked_for_again(migrated: str) -> None:
    async with running(migrated, 2) as (leaving, staying):
        key, opened = await open_relayed(leaving)
        claim = await leaving.relayed.claim(key, opened.standalone)
        assert claim is not None
        await relayed(leaving, claim.stream, b"first", b"last")
        await leaving.relayed.release([claim.stream])
        query(migrated, "UPDATE streams SET floor = 2 WHERE request_key IS NULL")
        query(migrated, "TRUNCATE events")
        again = await staying.relayed.claim(key, opened.standalone)
        assert again is not None
        assert (again.last_id, again.fresh, again.stream.next_seq) == (None, False, 3)


async def test_a_delete_ends_what_is_adrift(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, _ = await open_relayed(dead)
        stream = await open_call(dead, key)
        await relayed(dead, stream, b"a")
        await die(dead, alive)
        await alive.log.end_session(key, "deleted")
        assert await alive.relayed.claim(key, stream.number) is None
        with pytest.raises(SessionUnknown):
            await alive.relayed.find(key)
    seq, payload = stored(migrated, stream.number)[-1]
    assert (seq, json.loads(payload)["error"]) == (2, final_error("session_ended"))
    assert_streams_are_whole(migrated)


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
@pytest.mark.parametrize("ends", [0, 1], ids=["its own", "another worker"])
async def test_a_delete_ends_the_standalone_stream_where_it_is_read(
    migrated: str, ends: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it stays behind that a worker would wait for when it stops, and nothing is stored after its end."""
    monkeypatch.setattr(watch, "STAMP_INTERVAL", 0.2)
    async with running(migrated, 2) as stores:
        reads = stores[0]
        if not told:
            monkeypatch.setattr(parts(reads), "_session_ended", lambda session_id: None)
            monkeypatch.setattr(parts(reads).finisher, "_on_session_ended", lambda session_id: None)
        for _ in range(5):
            key, opened = await open_relayed(reads)
            claim = await reads.relayed.claim(key, opened.standalone)
            assert claim is not None
            await relayed(reads, claim.stream, b"a", b"b")

            async def store_more(stream: Stream = claim.stream) -> None:
                with pytest.raises(AppendRefused):
                    while True:
                        await relayed(reads, stream, None)

            storing = asyncio.create_task(store_more())
            await asyncio.sleep(0.01)
            await stores[ends].log.end_session(key, "deleted")
            await asyncio.wait_for(storing, 5)
        # The same for a stream that has no event under way.
        key, opened = await open_relayed(reads)
        claim = await reads.relayed.claim(key, opened.standalone)
        assert claim is not None and parts(reads).writer.calls.numbers() == [opened.standalone]
        await stores[ends].log.end_session(key, "deleted")
        await asyncio.wait_for(parts(reads).writer.calls.wait(), 5)
    assert_streams_are_whole(migrated)


async def test_a_delete_counts_what_is_adrift_of_the_standalone_stream(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, opened = await open_relayed(dead)
        claim = await dead.relayed.claim(key, opened.standalone)
        assert claim is not None
        await relayed(dead, claim.stream, b"a", b"b")
        await die(dead, alive)
        await alive.log.end_session(key, "deleted")
    assert_streams_are_whole(migrated)


async def test_a_stranger_claims_nothing(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, _ = await open_relayed(dead)
        other, _ = await open_relayed(dead)
        stream = await open_call(dead, key)
        await relayed(dead, stream, b"a")
        await die(dead, alive)
        for asker in (other, SessionKey(key.session_id, "another server", None, None)):
            assert await alive.relayed.claim(asker, stream.number) is None


async def test_calls_that_nobody_comes_back_for_are_found(migrated: str) -> None:
    async with running(migrated, 2) as (dead, alive):
        key, opened = await open_relayed(dead)
        assert await dead.relayed.claim(key, opened.standalone) is not None
        stream = await open_call(dead, key)
        await relayed(dead, stream, b"a")
        await die(dead, alive)
        assert await alive.relayed.overdue("server", 300) == []
        query(migrated, "UPDATE streams SET adrift_since = adrift_since - interval '301 s'")
        assert await alive.relayed.overdue("server", 300) == [(stream.number, key.session_id)]
        assert await alive.relayed.overdue("another server", 300) == []


async def test_two_replicas_a_delete_and_a_death_at_once_leave_every_stream_whole(migrated: str) -> None:
    """Whatever order they come in: one reads each stream, the other's appends are refused, and a session that has ended
    has no open call."""

    async def read(store: PostgresStore, key: SessionKey, number: int) -> bool:
        with contextlib.suppress(Error):
            claim = await store.relayed.claim(key, number)
            if claim is None:
                return False
            await relayed(store, claim.stream, b"x", b"y")
            await store.log.append(claim.stream, RESULT, final=True)
            return True
        return False

    async def race(seed: int, first: PostgresStore, second: PostgresStore) -> None:
        rng = random.Random(seed)
        key, _ = await open_relayed(first)
        streams = [await open_call(first, key, number) for number in range(1, 4)]
        for stream in streams:
            await relayed(first, stream, b"a")
        await first.relayed.release(streams)
        work = [read(store, key, stream.number) for stream in streams for store in (first, second)]
        rng.shuffle(work)

        async def delete() -> None:
            await asyncio.sleep(rng.uniform(0, 0.02))
            await second.log.end_session(key, "deleted")

        *won, _ = await asyncio.gather(*work, delete())
        assert sum(map(bool, won)) <= len(streams)

    async with running(migrated, 3) as (first, second, third):
        for start in range(0, 36, 6):
            await asyncio.gather(*(race(seed, first, second) for seed in range(start, start + 6)))
        # One of them dies in the middle of it; what it had is adrift or ended, and no stream is read twice.
        racing = asyncio.gather(*(race(seed, first, second) for seed in range(60, 70)), return_exceptions=True)
        await asyncio.sleep(0.01)
        await die(first, third)
        await racing
    assert_streams_are_whole(migrated)
    assert_no_deadlocks(migrated)
    open_calls = """
        SELECT count(*) FROM streams t JOIN sessions s ON s.id = t.session_id
         WHERE s.ended_at IS NOT NULL AND t.final_seq IS NULL
    """
    assert query(migrated, open_calls) == [(0,)]
