"""`mcp-pg-events sessions end` and `purge`: the end of a session, and the erasure of its payloads."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from mcp_pg_events.backend import CursorRejected, SessionKey, SessionUnknown
from mcp_pg_events.migrate import upgrade
from tests.support.log import (
    NOTE,
    RESULT,
    assert_streams_are_whole,
    open_call,
    open_session,
    query,
    running,
    standalone,
    until,
)
from tests.support.roles import login_role
from tests.support.sessions_command import fill, sessions


@contextlib.contextmanager
def listening(dsn: str, *workers: int) -> Iterator[Callable[[int], list[str]]]:
    """What is sent to workers: a function gives what one of them has been sent until now."""
    [(oid,)] = query(dsn, "SELECT 'mcp_events'::regnamespace::oid::bigint")
    heard: dict[str, list[str]] = {f"mcp_pg_events_{oid}_{worker}": [] for worker in workers}
    with psycopg.connect(dsn, autocommit=True) as connection:
        for channel in heard:
            connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))

        def until_now(worker: int) -> list[str]:
            for note in connection.notifies(timeout=0.5):
                heard[note.channel].append(note.payload)
            return heard[f"mcp_pg_events_{oid}_{worker}"]

        yield until_now


def test_an_end_gives_calls_their_final_and_tells_workers_and_readers(migrated: str) -> None:
    async def story() -> None:
        async with running(migrated, 2) as (store, other):
            key, opened = await open_session(store, owner='"ann"')
            call = await open_call(store, key)
            await store.log.append(call, NOTE)
            held = await other.log.attach(key, call.number, 1, patience=5)
            with listening(migrated, store.worker_number(), other.worker_number()) as heard:
                ran = sessions(migrated, "end", key.session_id, "--json")
                assert (ran.code, json.loads(ran.out)) == (0, {"ended": True, "calls": 1})
                assert f"s{call.number}" in heard(other.worker_number()), "the reader's worker"
                for each in (store, other):
                    assert f"e{key.session_id}" in heard(each.worker_number())
            page = await other.log.read(call.number, 1, held.bound)
            assert page.ended
            assert json.loads(page.events[0].payload)["error"]["data"] == {"reason": "session_ended"}
            for each in (store, other):
                with pytest.raises(SessionUnknown):
                    await each.log.find_session(key)
            ran = sessions(migrated, "end", key.session_id)
            assert (ran.code, ran.out) == (0, "It had ended already.\n")
            ended = query(migrated, "SELECT ended_reason FROM sessions WHERE id = %s", key.session_id)
            assert ended == [("deleted",)]
            del opened
        assert_streams_are_whole(migrated)

    asyncio.run(story())


# --- purging ----------------------------------------------------------------------------------------------------------


def kept_events(dsn: str) -> int:
    return int(query(dsn, "SELECT count(*) FROM events")[0][0])


def test_a_purge_erases_one_session_and_leaves_numbers_and_others_alone(migrated: str) -> None:
    async def story() -> None:
        async with running(migrated, 2) as (store, other):
            key, opened = await open_session(store)
            another, _ = await open_session(store)
            call, done = await open_call(store, key, 1), await open_call(store, key, 2)
            for stream in (call, done, standalone(key, opened)):
                await store.log.append(stream, NOTE)
            await store.log.append(done, RESULT, final=True)
            kept = await open_call(store, another, 1)
            await store.log.append(kept, NOTE)
            query(migrated, "INSERT INTO inbox (worker, session_id, payload) VALUES (999, %s, 'x')", key.session_id)
            held = await other.log.attach(key, call.number, 0, patience=5)

            ran = sessions(migrated, "purge", key.session_id, "--yes", "--json")
            assert ran.code == 0, ran
            # Of initialize, the call and its final, the one that was done, and the standalone stream.
            assert json.loads(ran.out) | {"bytes": 0} == {"ended": True, "calls": 1, "events": 6, "bytes": 0}

            assert kept_events(migrated) == 2
            left = query(migrated, "SELECT final_seq, floor FROM streams WHERE session_id = %s", key.session_id)
            assert sorted(left) == [(1, 1), (1, 1), (2, 2), (2, 2)]
            row = query(
                migrated,
                "SELECT initialize, log_level, subscriptions, ended_at IS NULL FROM sessions WHERE id = %s",
                key.session_id,
            )
            assert row == [(None, None, [], False)]
            assert query(migrated, "SELECT count(*) FROM inbox") == [(0,)]
            # A reader that was attached and lags is told, and does not take silence for the end.
            page = await other.log.read(call.number, 0, held.bound)
            assert (page.expired, list(page.events)) == (True, [])
            with pytest.raises(SessionUnknown):
                await other.log.attach(key, call.number, 1, patience=5)
            # The other session goes on, and so does the worker.
            assert await store.log.append(kept, RESULT, final=True) == 2
            fresh, _ = await open_session(other)
            assert (await open_call(other, fresh)).number > call.number
            again = sessions(migrated, "purge", key.session_id, "--yes", "--json")
            assert json.loads(again.out) == {"ended": False, "calls": 0, "events": 0, "bytes": 0}

    asyncio.run(story())


def test_what_was_purged_has_expired_and_is_not_unknown(migrated: str) -> None:
    """Were the session to live, as one on a stdio server does for a minute after its end."""

    async def story() -> None:
        async with running(migrated, 1) as (store,):
            key, _ = await open_session(store)
            call = await open_call(store, key)
            await store.log.append(call, NOTE)
            sessions(migrated, "purge", key.session_id, "--yes")
            query(migrated, "UPDATE sessions SET ended_at = NULL WHERE id = %s", key.session_id)
            with pytest.raises(CursorRejected) as rejected:
                await store.log.attach(key, call.number, 1, patience=5)
            assert rejected.value.reason == "expired"
            held = await store.log.attach(key, call.number, 2, patience=5)
            assert held.complete, "the final was given: nothing is missing"

    asyncio.run(story())


def test_a_purge_ends_streams_by_name_and_keeps_their_numbers(migrated: str) -> None:
    from mcp_types import JSONRPCNotification

    note = JSONRPCNotification(jsonrpc="2.0", method="notifications/message", params={})

    async def story() -> None:
        async with running(migrated, 1) as (store,):
            events = store.for_session("by-name")
            assert await events.store_event("a", note) == "1-1"
            sessions(migrated, "end", "by-name")
            # It does not ask whether the session has ended.
            events = store.for_session("by-name")
            assert await events.store_event("b", note) == "2-1"
            ran = sessions(migrated, "purge", "by-name", "--yes")
            assert ran.code == 0, ran
            assert kept_events(migrated) == 0
            assert await store.for_session("by-name").store_event("b", note) == "3-1"

    asyncio.run(story())


def test_a_purge_asks_and_where_nobody_can_answer_it_says_so(migrated: str) -> None:
    fill(migrated)
    ran = sessions(migrated, "purge", "s4")
    assert (ran.code, ran.out) == (2, "")
    assert "--yes" in ran.err
    assert query(migrated, "SELECT ended_at FROM sessions WHERE id = 's4'") == [(None,)]


def test_the_role_of_a_worker_may_look_and_end_and_may_not_purge(migrated: str) -> None:
    fill(migrated)
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT number, 1, '{}' FROM streams")
    with login_role(migrated) as (role, as_role):
        ran = sessions(as_role, "list")
        assert (ran.code, ran.out) == (1, "")
        assert "lacks a right: permission denied for schema mcp_events" in ran.err
        upgrade(migrated, worker_role=role)
        assert sessions(as_role, "list").code == 0
        assert sessions(as_role, "show", "s4").code == 0
        assert sessions(as_role, "end", "s4").code == 0
        ran = sessions(as_role, "purge", "s5", "--yes")
        assert (ran.code, ran.out) == (1, "")
        assert "lacks a right: permission denied for table events; use the role that owns the tables." in ran.err
        assert query(migrated, "SELECT floor FROM streams WHERE session_id = 's5'") == [(0,)]
        assert query(migrated, "SELECT count(*) FROM events WHERE payload = '{}'") == [(2,)]


def test_a_session_of_another_owner_is_as_good_as_ones_own(migrated: str) -> None:
    """An operator is nobody's principal; what `end` finds does not depend on the owner, null included."""

    async def story() -> None:
        async with running(migrated, 1) as (store,):
            for owner in (None, '"ann"'):
                key, _ = await open_session(store, owner=owner)
                ran = sessions(migrated, "end", key.session_id)
                assert ran.out == "Ended, and 0 running calls with it.\n"
                await until(lambda key=key: ended(migrated, key))  # type: ignore[misc]

    asyncio.run(story())


def ended(dsn: str, key: SessionKey) -> bool:
    return bool(query(dsn, "SELECT ended_at IS NOT NULL FROM sessions WHERE id = %s", key.session_id)[0][0])
