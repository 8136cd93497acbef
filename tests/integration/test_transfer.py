"""`mcp-pg-events export` and `import`: a session in another database, with its ids, where its client resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mcp_pg_events import migrate
from mcp_pg_events.backend import CursorRejected, SessionKey, SessionUnknown, Stream
from tests.support.ageing import age, grow_old
from tests.support.command import mcp_pg_events
from tests.support.log import (
    NOTE,
    RESULT,
    assert_streams_are_whole,
    open_call,
    open_session,
    partitions,
    query,
    running,
)
from tests.support.retaining import detach_and_give_up
from tests.support.transfers import ODD, a_session, everything, exported, imported

pytestmark = pytest.mark.anyio


async def test_a_session_arrives_with_its_ids_its_owner_and_its_times(
    migrated: str, other: str, tmp_path: Path
) -> None:
    session, done, runs = await a_session(migrated)
    lines = exported(migrated, session, tmp_path / "file")
    assert [line["type"] for line in lines] == ["header"] + ["stream"] * 4 + ["event"] * 5 + ["end"]
    assert (lines[0]["format"], lines[0]["version"]) == ("mcp-pg-events session", 1)
    ran = imported(other, tmp_path / "file", "--json")
    assert (ran.code, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert told == {
        **{"session": session, "streams": 4, "events": 5, "expired": 0},
        **{"lost": 1, "partitions": 0, "ended": False},
    }
    for statement in (
        "SELECT id, server, owner, initialize, protocol_version, created_at, ended_at FROM sessions",
        "SELECT number, session_id, request_id, request_key, method, cursor, last_seq, mark_seq, mark_at, floor, "
        "created_at FROM streams ORDER BY number",
        "SELECT stream, seq, created_at, origin, payload FROM events WHERE payload !~ 'worker_lost' ORDER BY 1, 2",
    ):
        assert query(other, statement) == query(migrated, statement)  # type: ignore[arg-type]  # text of this test
    assert query(other, "SELECT payload FROM events WHERE stream = %s AND seq = 2", done) == [(ODD,)]
    [(error,)] = query(other, "SELECT payload FROM events WHERE stream = %s AND seq = 2", runs)
    assert json.loads(error)["error"]["data"] == {"reason": "worker_lost"}
    assert_streams_are_whole(other)
    # And a second time from there, which is the same file but for the moment.
    again = exported(other, session, tmp_path / "again")
    assert again[-1] == {"type": "end", "streams": 4, "events": 6}


async def test_a_client_resumes_there_and_numbers_go_on_rising(migrated: str, other: str, tmp_path: Path) -> None:
    session, done, runs = await a_session(migrated)
    exported(migrated, session, tmp_path / "file")
    async with running(other, 2) as (store, second):
        ran = imported(other, tmp_path / "file")
        assert ran.code == 0, ran
        assert "1 call that ran has ended" in ran.out
        key = SessionKey(session, "server", '"ann"', 60.0)
        held = await store.log.attach(key, done, 1, patience=5)
        page = await store.log.read(done, held.position, held.bound)
        assert [(event.seq, event.payload) for event in page.events] == [(2, ODD.encode())]
        held = await second.log.attach(key, runs, 1, patience=5)
        page = await second.log.read(runs, held.position, held.bound)
        assert ([event.seq for event in page.events], page.ended) == ([2], True)
        with pytest.raises(SessionUnknown):
            await store.log.attach(SessionKey(session, "server", '"bob"', None), done, 1, patience=5)
        call = await open_call(second, key, 9)
        assert call.number > max(done, runs)
        await second.log.append(call, RESULT, final=True)
        record = await store.log.find_session(key)
        shared = Stream(record.standalone, session, shared=True)
        assert await store.log.append(shared, NOTE) == 2
        assert await second.log.append(Stream(record.standalone, session, shared=True), NOTE) == 3
    assert_streams_are_whole(other)


@pytest.mark.parametrize("top", [7, 5_000, 3_000_000])
async def test_numbers_rise_above_those_of_the_file(migrated: str, other: str, tmp_path: Path, top: int) -> None:
    query(migrated, "SELECT setval(pg_get_serial_sequence('mcp_events.streams', 'number'), %s)", top)
    session, _, runs = await a_session(migrated)
    assert runs > top
    exported(migrated, session, tmp_path / "file")
    async with running(other, 1) as (store,):
        first, _ = await open_session(store)
        assert imported(other, tmp_path / "file").code == 0
        assert (await open_call(store, first)).number > runs


async def test_past_events_get_partitions_or_count_as_expired(migrated: str, other: str, tmp_path: Path) -> None:
    age(migrated)
    session, done, runs = await a_session(migrated)
    grow_old(migrated, done, 1, 9)
    grow_old(migrated, runs, 1, 3)
    exported(migrated, session, tmp_path / "file")
    before = everything(other)
    async with running(other, 1) as (store,):
        key = SessionKey(session, "server", '"ann"', None)
        ran = imported(other, tmp_path / "file", "--ttl", "7d", "--json")
        told = json.loads(ran.out)
        assert (told["events"], told["expired"], told["partitions"]) == (4, 1, 1)
        with pytest.raises(CursorRejected) as rejected:
            await store.log.attach(key, done, 0, patience=5)
        assert rejected.value.reason == "expired"
        held = await store.log.attach(key, done, 1, patience=5)
        assert [event.seq for event in (await store.log.read(done, 1, held.bound)).events] == [2]
        query(other, "DELETE FROM events")
        query(other, "DELETE FROM streams")
        query(other, "DELETE FROM sessions")
        ran = imported(other, tmp_path / "file", "--json")
        assert json.loads(ran.out) | {"session": ""} == {
            **{"session": "", "streams": 4, "events": 5, "expired": 0},
            **{"lost": 1, "partitions": 1, "ended": False},
        }
        held = await store.log.attach(key, done, 0, patience=5)
        assert [event.seq for event in (await store.log.read(done, 0, held.bound)).events] == [1, 2]
    assert len(partitions(other)) == len(before[-1]) + 2
    assert query(other, "SELECT ensure_partitions(2)") == [(0,)]
    ran = mcp_pg_events("retention", "--ttl", "7d", "--json", MCP_PG_EVENTS_DSN=other)
    assert [each["result"] for each in json.loads(ran.out)["partitions"]].count("dropped") == 1


async def test_what_falls_into_a_partition_that_is_half_detached_counts_as_expired(
    migrated: str, other: str, tmp_path: Path
) -> None:
    age(migrated)
    age(other)
    session, done, _ = await a_session(migrated)
    grow_old(migrated, done, 1, 9)
    exported(migrated, session, tmp_path / "file")
    detach_and_give_up(other, partitions(other)[3])
    ran = imported(other, tmp_path / "file", "--json")
    assert ran.code == 0, ran
    assert json.loads(ran.out)["expired"] == 1
    assert query(other, "SELECT floor FROM streams WHERE number = %s", done) == [(1,)]


async def test_a_session_that_lived_on_one_worker_ends(migrated: str, other: str, tmp_path: Path) -> None:
    session, _, _ = await a_session(migrated)
    query(migrated, "UPDATE sessions SET worker = 1")
    exported(migrated, session, tmp_path / "file")
    ran = imported(other, tmp_path / "file", "--json")
    assert json.loads(ran.out)["ended"] is True
    assert query(other, "SELECT worker, ended_reason FROM sessions") == [(None, "worker_lost")]
    assert query(other, "SELECT count(*) FROM streams WHERE final_seq IS NULL") == [(0,)]
    assert_streams_are_whole(other)


async def test_streams_of_an_upstream_are_adrift_as_after_the_death_of_a_replica(
    migrated: str, other: str, tmp_path: Path
) -> None:
    query(migrated, "INSERT INTO sessions (id, server, upstream) VALUES ('s', 'proxied', 'theirs')")
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key, worker, upstream_id) VALUES "
        "('s', '1', 'i1', 1, 'x1'), ('s', '2', 'i2', 1, NULL), ('s', NULL, NULL, 1, NULL)",
    )
    query(migrated, "INSERT INTO events (stream, seq, payload, upstream_id) VALUES (1, 1, '{}', 'x1')")
    exported(migrated, "s", tmp_path / "file")
    ran = imported(other, tmp_path / "file", "--json")
    assert (ran.code, json.loads(ran.out)["lost"]) == (0, 1), ran
    found = query(other, "SELECT number, adrift_since IS NOT NULL, final_seq, upstream_id FROM streams ORDER BY 1")
    assert found == [(1, True, None, "x1"), (2, False, 1, None), (3, True, None, None)]
    [(error,)] = query(other, "SELECT payload FROM events WHERE stream = 2")
    assert json.loads(error)["error"]["data"] == {"reason": "upstream_lost"}
    assert query(other, "SELECT upstream FROM sessions") == [("theirs",)]
    assert query(other, "SELECT upstream_id FROM events WHERE stream = 1") == [("x1",)]


async def test_into_another_schema_and_by_stdin(migrated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, _, _ = await a_session(migrated)
    file = tmp_path / "file"
    ran = mcp_pg_events("export", session, "--output", str(file), MCP_PG_EVENTS_DSN=migrated)
    assert (ran.code, ran.out) == (0, "")
    assert ran.err == "4 streams and 5 events.\n1 call runs; where this is imported it ends with an error.\n"
    ran = mcp_pg_events("export", session, "--output", str(file), MCP_PG_EVENTS_DSN=migrated)
    assert (ran.code, "cannot be written (File exists)" in ran.err) == (1, True)
    ran = mcp_pg_events("export", "nobody", "--output", str(file) + "2", MCP_PG_EVENTS_DSN=migrated)
    assert (ran.code, (tmp_path / "file2").exists()) == (1, False)
    schema = 'an "other" {0} %s'
    migrate.upgrade(migrated, schema=schema, partition_interval="hour")
    with file.open() as lines:
        monkeypatch.setattr("sys.stdin", lines)
        ran = mcp_pg_events("import", "--schema", schema, MCP_PG_EVENTS_DSN=migrated)
    assert (ran.code, ran.err) == (0, ""), ran
    ran = mcp_pg_events("sessions", "list", "--schema", schema, "--json", MCP_PG_EVENTS_DSN=migrated)
    assert [each["id"] for each in json.loads(ran.out)["sessions"]] == [session]
