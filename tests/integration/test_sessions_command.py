"""`mcp-pg-events sessions`: pages, one session, its end, and the erasure of its payloads."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

from mcp_pg_events.backend import CursorRejected, SessionKey, SessionUnknown
from mcp_pg_events.migrate import upgrade
from tests.support.command import Ran, mcp_pg_events
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
from tests.support.postgres import PASSWORD, database_name, dsn_url

HOSTILE = "\x1b[31mred\x1b[0m [bold]x[/bold] \u202e \r\n\x07"


def sessions(dsn: str, command: str, *arguments: str) -> Ran:
    return mcp_pg_events("sessions", command, "--dsn", dsn, *arguments)


def listed(dsn: str, *arguments: str) -> Any:
    ran = sessions(dsn, "list", "--json", *arguments)
    assert (ran.code, ran.err) == (0, ""), ran
    return json.loads(ran.out)


def ids(dsn: str, *arguments: str) -> list[str]:
    return [each["id"] for each in listed(dsn, *arguments)["sessions"]]


def fill(dsn: str, count: int = 10) -> None:
    """Sessions s1 (the newest) to s<count>: of two servers, two owners, every third ended; a call runs in s4 and s5."""
    query(
        dsn,
        """
        INSERT INTO sessions (id, server, owner, created_at, seen_at, ended_at, ended_reason)
        SELECT 's' || n, CASE WHEN n %% 2 = 0 THEN 'even' ELSE 'odd' END,
               CASE WHEN n %% 5 = 0 THEN '"ann"' WHEN n %% 5 = 1 THEN '["client", "issuer", "bob"]' END,
               now() - n * interval '1 hour', now() - n * interval '1 minute',
               CASE WHEN n %% 3 = 0 THEN now() END, CASE WHEN n %% 3 = 0 THEN 'deleted' END
          FROM generate_series(1, %s) n
        """,
        count,
    )
    query(
        dsn,
        "INSERT INTO streams (session_id, request_id, request_key, method, reader_worker) VALUES "
        "('s4', '1', 'i1', 'tools/call', 3), ('s5', '1', 'i1', 'prompts/get', NULL)",
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "1 2 4 5 7 8 10"),
        (["--state", "ended"], "3 6 9"),
        (["--state", "all"], "1 2 3 4 5 6 7 8 9 10"),
        (["--server", "even"], "2 4 8 10"),
        (["--server", "' OR true --"], ""),
        (["--owner", "ann", "--state", "all"], "5 10"),
        (["--owner", '"ann"'], "5 10"),
        (["--owner", '["client", "issuer", "bob"]', "--state", "all"], "1 6"),
        (["--since", "270m"], "1 2 4"),
        (["--until", "270m"], "5 7 8 10"),
        (["--since", "2020-01-01T00:00+01:00", "--until", "2020-01-02"], ""),
        (["--idle", "5m"], "5 7 8 10"),
        (["--idle", "5m", "--state", "all"], "5 7 8 10"),
        (["--running"], "4 5"),
        (["--method", "tools/call"], "4"),
        (["--method", "tools/call", "--running", "--server", "odd"], ""),
    ],
)
def test_a_list_has_the_sessions_that_were_asked_for(migrated: str, arguments: list[str], expected: str) -> None:
    fill(migrated)
    assert ids(migrated, *arguments) == [f"s{n}" for n in expected.split()]


def test_pages_have_every_session_once_also_when_new_ones_come(migrated: str) -> None:
    fill(migrated, 25)
    # One moment for several, so that the id has to break the tie.
    query(migrated, "UPDATE sessions SET created_at = date_trunc('day', created_at)")
    seen: list[str] = []
    after: list[str] = []
    while True:
        page = listed(migrated, "--state", "all", "--limit", "4", *after)
        seen += [each["id"] for each in page["sessions"]]
        if page["next"] is None:
            break
        query(migrated, "INSERT INTO sessions (id, server) VALUES (%s, 'new')", f"new{len(seen)}")
        after = ["--after", page["next"]]
    assert sorted(seen) == sorted(f"s{n}" for n in range(1, 26))
    shown = sessions(migrated, "list", "--limit", "2").out.splitlines()
    assert len(shown) == 4
    assert shown[-1].startswith("There are more: --after ")


def test_a_list_is_a_table_and_counts_calls_and_readers(migrated: str) -> None:
    assert sessions(migrated, "list").out == "There are no such live sessions.\n"
    fill(migrated)
    head, *lines = sessions(migrated, "list").out.splitlines()
    assert head.split() == ["SESSION", "SERVER", "OWNER", "OPENED", "(UTC)", "STATE", "CALLS", "READERS"]
    [four] = [line for line in lines if line.startswith("s4")]
    assert four.endswith("1      1")
    assert "live, idle 4m" in four
    assert "ended (deleted)" in sessions(migrated, "list", "--state", "ended").out


@pytest.mark.parametrize("after", ["", "x", "é", "W10", "WzEsMl0", "W251bGwsICJcdTAwMDAiXQ"])
def test_a_place_that_no_page_named_is_refused(migrated: str, after: str) -> None:
    ran = sessions(migrated, "list", "--after", after)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == "mcp-pg-events: --after takes what an earlier page of this list ended with.\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--since", "yesterday"],
        ["--idle", "0s"],
        ["--idle", "5m", "--state", "ended"],
        ["--limit", "0"],
        ["--state", "dead"],
    ],
)
def test_an_option_that_cannot_be_read_is_said_with_exit_code_2(migrated: str, arguments: list[str]) -> None:
    ran = sessions(migrated, "list", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("command", ["show", "end", "purge", "list"])
def test_no_escape_sequence_reaches_a_terminal(migrated: str, command: str) -> None:
    query(
        migrated,
        "INSERT INTO sessions (id, server, owner, initialize, ended_reason) VALUES (%s, %s, %s, %s, %s)",
        *(HOSTILE, HOSTILE, HOSTILE, json.dumps({"clientInfo": {"name": HOSTILE, "version": HOSTILE}}), HOSTILE),
    )
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key, method) VALUES (%s, %s, 'i1', %s)",
        *(HOSTILE, HOSTILE, HOSTILE),
    )
    arguments = {"list": [], "purge": ["--yes", HOSTILE]}.get(command, [HOSTILE])
    for each in ([command, *arguments], ["list", "--state", "all"], ["show", HOSTILE], ["show", HOSTILE + "?"]):
        ran = sessions(migrated, *each)
        written = ran.out + ran.err
        assert all(character.isprintable() or character == "\n" for character in written), repr(written)
        assert "[bold]" in written or command in ("end", "purge")


def test_show_has_calls_workers_readers_streams_and_sizes(migrated: str) -> None:
    async def story() -> None:
        async with running(migrated, 2) as (store, other):
            key, opened = await open_session(store, owner='"ann"')
            call = await open_call(store, key)
            for _ in range(3):
                await store.log.append(call, NOTE)
            await store.log.append(standalone(key, opened), NOTE)
            await other.log.attach(key, call.number, 1, patience=5)
            ran = sessions(migrated, "show", key.session_id, "--json")
            found = json.loads(ran.out)
            assert (found["id"], found["owner"], found["ended_at"]) == (key.session_id, '"ann"', None)
            assert (found["streams"], found["calls"], found["events"]) == (3, 1, 5)
            assert found["bytes"] == 4 * len(NOTE) + len(RESULT)
            [running_call] = found["running"]
            assert running_call["stream"] == call.number
            assert running_call["method"] == "tools/call"
            assert (running_call["events"], running_call["alive"]) == (3, True)
            assert running_call["worker"] == store.worker_number()
            assert running_call["reader"] == other.worker_number()
            assert [each["last_seq"] for each in found["newest_streams"]] == [3, 1, 1]
            shown = (sessions(migrated, "show", key.session_id)).out
            assert "running calls  1" in shown
            assert "tools/call" in shown
            assert f"worker {other.worker_number()}" in shown

    asyncio.run(story())


def test_show_says_what_is_not_recorded_of_a_session_that_is_proxied(migrated: str) -> None:
    query(
        migrated,
        "INSERT INTO sessions (id, server, initialize, protocol_version, upstream) VALUES "
        "('direct', 'x', '{}', '2025-11-25', NULL), ('proxied', 'x', '{}', '2025-11-25', ''), "
        """('named', 'x', '{"clientInfo": {"name": "claude", "version": "7"}}', '2025-11-25', NULL)""",
    )
    shown = {
        name: [line.split(maxsplit=1)[1] for line in sessions(migrated, "show", name).out.splitlines() if line][3:7]
        for name in ("direct", "proxied", "named")
    }
    nothing = "not recorded (proxied)"
    assert shown["direct"] == ["unknown", "2025-11-25", "level      not set", "0"]
    assert shown["proxied"] == [nothing, "2025-11-25", f"level      {nothing}", nothing]
    assert shown["named"] == ["claude 7", "2025-11-25", "level      not set", "0"]
    assert [json.loads(sessions(migrated, "show", name, "--json").out)["proxied"] for name in shown] == [
        False,
        True,
        False,
    ]


def test_one_of_something_is_no_plural(migrated: str) -> None:
    fill(migrated)
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT number, 1, '{}' FROM streams")
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key, final_seq) "
        "SELECT 's4', n, n, 0 FROM generate_series(2, 21) n",
    )
    assert "\n... and 1 older stream\n" in sessions(migrated, "show", "s4").out
    assert sessions(migrated, "end", "s4").out == "Ended, and 1 running call with it.\n"
    assert sessions(migrated, "purge", "s5", "--yes").out.startswith(
        "Ended, and 1 running call with it.\nErased 2 events, "
    )
    query(migrated, "INSERT INTO streams (session_id) VALUES ('s7')")
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT max(number), 1, '{}' FROM streams")
    assert sessions(migrated, "purge", "s7", "--yes").out == (
        "Ended, and 0 running calls with it.\nErased 1 event, 2 B.\n"
    )


def test_show_leaves_sizes_out_that_take_too_long(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(migrated)
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT 1, n, 'x' FROM generate_series(1, 200000) n")
    monkeypatch.setattr("mcp_pg_events.operator.sessions.SIZE_PATIENCE", 0.002)
    assert "not added up within" in sessions(migrated, "show", "s4").out
    found = json.loads(sessions(migrated, "show", "s4", "--json").out)
    assert (found["events"], found["bytes"]) == (None, None)
    assert found["running"][0]["events"] == 200000


@pytest.mark.parametrize("command", [["show"], ["end"], ["purge", "--yes"]])
@pytest.mark.parametrize("session", ["nobody", "'; DROP TABLE events --", ""])
def test_a_session_that_there_is_not_is_said(migrated: str, command: list[str], session: str) -> None:
    ran = sessions(migrated, *command, "--", session)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"mcp-pg-events: There is no session {session!r} in schema mcp_events; ")


def test_a_schema_may_have_any_name(migrated: str) -> None:
    schema = 'it\'s "we"ird" {0} %s %% \x7f'.replace("\x7f", "é")
    upgrade(migrated, schema=schema)
    assert listed(migrated, "--schema", schema, "--server", "x", "--idle", "5m") == {"sessions": [], "next": None}
    ran = sessions(migrated, "purge", "--schema", schema, "--yes", "nobody")
    assert ran.err.startswith(f"mcp-pg-events: There is no session 'nobody' in schema {schema};")


# --- the end ----------------------------------------------------------------------------------------------------------


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
    role = f"sessions_{database_name(migrated)}"
    query(migrated, sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(PASSWORD)))
    as_role = dsn_url(migrated, user=role, password=PASSWORD)
    fill(migrated)
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT number, 1, '{}' FROM streams")
    try:
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
    finally:
        query(migrated, sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        query(migrated, sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


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
