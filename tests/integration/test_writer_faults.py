"""Appends while things break: nothing is lost or stored twice, and no stream is corrupted (invariants 1, 2 and 14)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest

from mcp_pg_events import PostgresStore, pending
from mcp_pg_events.backend import SessionKey, Stream
from mcp_pg_events.errors import AppendRefused, DatabaseUnavailable, Error
from tests.support.deaf_proxy import dsn_through, target_of
from tests.support.log import (
    NOTE,
    RESULT,
    assert_streams_are_whole,
    numbered,
    open_call,
    open_session,
    partitions,
    parts,
    query,
    running,
    standalone,
    stored,
    until,
)
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def behind_a_proxy(dsn: str, **options: Any) -> AsyncIterator[tuple[PostgresStore, TcpProxy]]:
    """A store that reaches PostgreSQL through a proxy, but for its listener."""
    async with TcpProxy.to(*target_of(dsn)) as proxy:
        store = PostgresStore(dsn_through(proxy, dsn), listen_dsn=dsn, **options)
        async with store:
            try:
                yield store, proxy
            finally:
                await proxy.restore()


@pytest.fixture(params=["own", "shared"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def a_stream(store: PostgresStore, kind: str) -> tuple[SessionKey, Stream]:
    """A stream whose numbers come from this worker, or from the database."""
    key, opened = await open_session(store)
    return key, await open_call(store, key) if kind == "own" else standalone(key, opened)


def assert_stored_once(dsn: str, stream: Stream, acknowledged: list[tuple[int, bytes]]) -> None:
    assert sorted(acknowledged) == stored(dsn, stream.number)
    assert [seq for seq, _ in sorted(acknowledged)] == list(range(1, len(acknowledged) + 1))


# The connection breaks


async def test_a_backend_that_is_ended_again_and_again_in_mid_flush_costs_nothing(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,):
        key, opened = await open_session(store)
        streams = [standalone(key, opened), *[await open_call(store, key, number) for number in range(1, 4)]]
        acknowledged: dict[int, list[tuple[int, bytes]]] = {stream.number: [] for stream in streams}
        done = asyncio.Event()

        async def work(stream: Stream, caller: int) -> None:
            index = 0
            while not done.is_set() or index < 10:
                payload = numbered(caller, index)
                acknowledged[stream.number].append((await store.log.append(stream, payload), payload))
                index += 1

        def end_backends() -> None:
            statement = """
                SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                 WHERE datname = current_database() AND state = 'active' AND query LIKE '%%mcp_pg_events:append%%'
                   AND pid <> pg_backend_pid()
            """
            ended = 0
            with psycopg.connect(migrated_once, autocommit=True) as connection:
                while ended < 12 and not done.is_set():
                    ended += connection.execute(statement).rowcount

        workers = [asyncio.create_task(work(stream, caller)) for stream in streams for caller in range(3)]
        try:
            await asyncio.wait_for(asyncio.to_thread(end_backends), 30)
        finally:
            done.set()
        await asyncio.wait_for(asyncio.gather(*workers), 30)
        # In the order in which each caller sent them.
        for stream in streams:
            assert_stored_once(migrated_once, stream, acknowledged[stream.number])
            for caller in range(3):
                indexes = [
                    sent["index"]
                    for sent in (json.loads(payload) for _, payload in sorted(acknowledged[stream.number]))
                    if sent["caller"] == str(caller)
                ]
                assert indexes == sorted(indexes)


@pytest.mark.parametrize("reached", ["not sent", "committed", "running"])
async def test_a_commit_of_unknown_outcome_is_stored_exactly_once(migrated_once: str, kind: str, reached: str) -> None:
    async with behind_a_proxy(migrated_once) as (store, proxy):
        _, stream = await a_stream(store, kind)
        before = [(await store.log.append(stream, numbered("before", 0)), numbered("before", 0))]
        payloads = [numbered("caller", index) for index in range(3)]
        blocking = contextlib.ExitStack()
        match reached:
            case "not sent":
                proxy.freeze()
            case "committed":
                proxy.mute()
            case "running":
                # The statement has its fence and waits for the partition: the old backend goes on after the cut.
                blocker = blocking.enter_context(psycopg.connect(migrated_once))
                for name in partitions(migrated_once):
                    blocker.execute(
                        psycopg.sql.SQL("LOCK mcp_events.{} IN SHARE MODE").format(psycopg.sql.Identifier(name))
                    )
        with blocking:
            tasks = [asyncio.create_task(store.log.append(stream, payload)) for payload in payloads]
            match reached:
                case "not sent":
                    await proxy.holding()
                case "committed":
                    await until(lambda: len(stored(migrated_once, stream.number)) == 4)
                case "running":
                    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%:append%%'"
                    await until(lambda: query(migrated_once, waits))
            proxy.cut()
            await proxy.restore()
            if reached == "running":
                waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%%:lock_self%%'"
                await until(lambda: query(migrated_once, waits))
        seqs = await asyncio.wait_for(asyncio.gather(*tasks), 20)
        after = [(await store.log.append(stream, numbered("after", 0)), numbered("after", 0))]
        assert_stored_once(migrated_once, stream, before + list(zip(seqs, payloads, strict=True)) + after)


async def test_a_flush_that_never_arrived_is_not_taken_for_the_final_that_did(migrated_once: str) -> None:
    """While the writer reconnects, the session ends elsewhere: its error gets the number of the lost flush."""
    async with behind_a_proxy(migrated_once) as (store, proxy), PostgresStore(migrated_once) as other:
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        subscription = store.hub.subscribe(stream.number, key.session_id, 1)
        await store.log.append(stream, NOTE)
        subscription.take()
        proxy.freeze()
        task = asyncio.create_task(store.log.append(stream, RESULT, final=True))
        await proxy.holding()
        await proxy.refuse()
        await other.log.end_session(key, "deleted")
        await proxy.restore()
        with pytest.raises(AppendRefused):
            await asyncio.wait_for(task, 20)
        assert subscription.take() == [], "delivered, and it is not in the log"
    first, last = stored(migrated_once, stream.number)
    assert first == (1, NOTE)
    assert json.loads(last[1])["error"]["data"] == {"reason": "session_ended"}


# The database refuses


async def test_what_may_work_later_is_tried_again(migrated_once: str, kind: str) -> None:
    """Serialization failures and deadlocks, lock and statement time-outs, one after the other."""
    sqlstates = ["40001", "40P01", "55P03", "57014"]
    async with running(migrated_once, 1) as (store,):
        _, stream = await a_stream(store, kind)
        with some_inserts_failing(migrated_once, sqlstates):
            payloads = [numbered("caller", index) for index in range(5)]
            appends = [store.log.append(stream, payload) for payload in payloads]
            seqs = await asyncio.wait_for(asyncio.gather(*appends), 20)
        assert query(migrated_once, "SELECT last_value >= %s FROM hiccups", len(sqlstates)) == [(True,)]
        assert_stored_once(migrated_once, stream, list(zip(seqs, payloads, strict=True)))


@contextlib.contextmanager
def some_inserts_failing(dsn: str, sqlstates: list[str]) -> Iterator[None]:
    # A sequence is not rolled back with the statement that failed.
    query(dsn, "CREATE SEQUENCE IF NOT EXISTS hiccups")
    query(dsn, "SELECT setval('hiccups', 1, false)")
    function = """
        CREATE OR REPLACE FUNCTION hiccup() RETURNS trigger LANGUAGE plpgsql AS $$
        DECLARE code text := (ARRAY[{}])[nextval('mcp_events.hiccups')];
        BEGIN
            IF code IS NOT NULL THEN RAISE EXCEPTION 'hiccup' USING ERRCODE = code; END IF;
            RETURN NEW;
        END $$
    """
    query(dsn, psycopg.sql.SQL(function).format(psycopg.sql.SQL(", ").join(sqlstates)))
    query(dsn, "CREATE TRIGGER hiccup BEFORE INSERT ON events FOR EACH ROW EXECUTE FUNCTION hiccup()")
    yield
    query(dsn, "DROP TRIGGER hiccup ON events")


async def test_an_event_that_cannot_be_stored_costs_its_own_stream_alone(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,):
        key, opened = await open_session(store)
        bad, good = await open_call(store, key, 1), await open_call(store, key, 2)
        shared = standalone(key, opened)
        told = asyncio.Event()
        bad.on_ended = told.set
        outcomes = await asyncio.gather(
            store.log.append(bad, NOTE),
            store.log.append(good, NOTE),
            store.log.append(bad, b"\xff is no UTF-8"),
            store.log.append(shared, NOTE),
            store.log.append(bad, NOTE),
            store.log.append(shared, b"\xff is no UTF-8"),
            store.log.append(good, RESULT, final=True),
            store.log.append(shared, NOTE),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in outcomes] == [
            int,
            int,
            AppendRefused,
            int,
            AppendRefused,
            AppendRefused,
            int,
            int,
        ]
        assert outcomes[-1] == 2, "a number was lost"
        assert told.is_set(), "its call goes on for nobody"
        # Whoever waits for it gets an error.
        await until(lambda: len(stored(migrated_once, bad.number)) == 2)
    assert json.loads(stored(migrated_once, bad.number)[-1][1])["error"]["data"] == {"reason": "not_stored"}
    assert_streams_are_whole(migrated_once)


# The caller goes


async def test_a_caller_that_is_cancelled_leaves_no_gap(migrated_once: str, kind: str) -> None:
    async with behind_a_proxy(migrated_once) as (store, proxy):
        _, stream = await a_stream(store, kind)
        proxy.freeze()
        tasks = [asyncio.create_task(store.log.append(stream, numbered(0, index))) for index in range(6)]
        await proxy.holding()
        tasks[1].cancel()
        tasks[4].cancel()
        proxy.thaw()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [
            int,
            asyncio.CancelledError,
            int,
            int,
            asyncio.CancelledError,
            int,
        ]
        assert await store.log.append(stream, numbered(0, 6)) == 7
        # Its number was given, so it is stored.
        assert stored(migrated_once, stream.number) == [(index + 1, numbered(0, index)) for index in range(7)]


async def test_a_final_whose_caller_is_cancelled_still_ends_its_stream(migrated_once: str) -> None:
    async with behind_a_proxy(migrated_once) as (store, proxy):
        _, stream = await a_stream(store, "own")
        proxy.freeze()
        task = asyncio.create_task(store.log.append(stream, RESULT, final=True))
        await proxy.holding()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(AppendRefused):
            await store.log.append(stream, NOTE)
        proxy.thaw()
        await asyncio.wait_for(parts(store).writer.calls.wait(), 10)
    assert stored(migrated_once, stream.number) == [(1, RESULT)]
    assert_streams_are_whole(migrated_once)


async def test_what_waits_for_the_database_is_bounded_and_who_waits_for_room_may_be_cancelled(
    migrated_once: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "PENDING_BYTES", 3 * len(NOTE))
    async with behind_a_proxy(migrated_once) as (store, proxy):
        _, stream = await a_stream(store, kind)
        proxy.freeze()
        flushing = asyncio.create_task(store.log.append(stream, NOTE))
        await proxy.holding()
        tasks = [asyncio.create_task(store.log.append(stream, numbered(0, index))) for index in range(100)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(parts(store).writer._queue) < 10
        for task in tasks[1::2]:
            task.cancel()
        proxy.thaw()
        assert await flushing == 1
        seqs = [await task for task in tasks[::2]]
        found = stored(migrated_once, stream.number)
    assert seqs == sorted(seqs)
    assert [seq for seq, _ in found] == list(range(1, len(found) + 1))
    assert {json.loads(payload).get("index") for _, payload in found} >= set(range(0, 100, 2))


# An outage that lasts


async def test_an_outage_longer_than_its_bound_ends_the_calls_and_the_worker_goes_on_under_a_new_number(
    migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        behind_a_proxy(migrated_once, outage_timeout=0.4) as (store, proxy),
        PostgresStore(migrated_once) as other,
    ):
        key, opened = await open_session(store)
        stream, quiet = await open_call(store, key, 1), await open_call(store, key, 2)
        ended: list[int] = []
        for each in (stream, quiet):
            each.on_ended = lambda number=each.number: ended.append(number)  # type: ignore[misc]
        old = store.worker_number()
        await store.log.append(stream, NOTE)
        await proxy.refuse()
        appends = [store.log.append(each, NOTE) for each in (stream, standalone(key, opened), stream)]
        outcomes = await asyncio.wait_for(asyncio.gather(*appends, return_exceptions=True), 10)
        assert {type(outcome) for outcome in outcomes} == {DatabaseUnavailable}
        assert sorted(ended) == [stream.number, quiet.number], "their handlers work for nobody"
        # Not again the whole time-out: it is known that there is no database.
        for each in (stream, standalone(key, opened)):
            with pytest.raises(Error):
                await asyncio.wait_for(store.log.append(each, NOTE), 0.3)
        await proxy.restore()
        await until(lambda: not parts(store).writer.lost)
        assert store.worker_number() != old
        third = await open_call(store, key, 3)
        assert await store.log.append(third, RESULT, final=True) == 1
        renewal = parts(store)._renewal
        assert renewal is not None
        await asyncio.wait_for(renewal, 10)
        for number in (1, 2):
            # The ids are free again, wherever.
            await open_call(other, key, number)
    for number, before in ((stream.number, [NOTE]), (quiet.number, [])):
        *events, (_, final) = stored(migrated_once, number)
        assert [payload for _, payload in events] == before
        assert json.loads(final)["error"]["data"] == {"reason": "outage"}
    assert_streams_are_whole(migrated_once)
    assert "password" not in caplog.text
    assert "Traceback" not in caplog.text


async def test_an_outage_counts_from_its_own_beginning_also_when_nobody_waited_for_the_end_of_the_last(
    migrated_once: str,
) -> None:
    async with behind_a_proxy(migrated_once, outage_timeout=1) as (store, proxy):
        writer = parts(store).writer
        _, given_up = await a_stream(store, "own")
        _, stream = await a_stream(store, "own")
        await proxy.refuse()
        waiting = asyncio.create_task(store.log.append(given_up, NOTE))
        await until(lambda: writer.stall.since is not None)
        began = writer.stall.since
        assert began is not None
        # Its session is deleted, say, or the drain's time is up.
        writer.ended_elsewhere(given_up.number)
        with pytest.raises(AppendRefused):
            await waiting
        await proxy.restore()
        await asyncio.sleep(began + 1 - asyncio.get_running_loop().time())
        await proxy.refuse()
        waiting = asyncio.create_task(store.log.append(stream, NOTE))
        await until(lambda: (writer.stall.since or began) > began)
        await proxy.restore()
        assert await waiting == 1
