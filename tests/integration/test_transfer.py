"""`mcp-pg-events export` and `import`: a session in another database, with its ids, or nothing changed at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from mcp_pg_events import migrate
from mcp_pg_events.backend import CursorRejected, SessionUnknown
from tests.support.ageing import age, grow_old
from tests.support.command import Ran, mcp_pg_events
from tests.support.log import (
    NOTE,
    RESULT,
    assert_streams_are_whole,
    open_call,
    open_session,
    partitions,
    query,
    running,
    standalone,
)
from tests.support.postgres import PASSWORD, create_database, database_name, drop_database, dsn_url

pytestmark = pytest.mark.anyio

ODD = '{"jsonrpc":"2.0","id":1,"result":{"text":"\\u0000 \\ud800 é \u2028 👩‍👩‍👧‍👦 \\u001b[2J"}}'


@pytest.fixture
def other(postgres_dsn: str, migrated_template: str) -> Iterator[str]:
    """A second migrated database."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    yield dsn
    drop_database(postgres_dsn, dsn)


def exported(dsn: str, session: str, file: Path) -> list[dict[str, Any]]:
    """The lines of an export, which is in `file` then."""
    ran = mcp_pg_events("export", session, MCP_PG_EVENTS_DSN=dsn)
    assert ran.code == 0, ran
    assert ran.out.isascii()
    file.write_text(ran.out)
    return [json.loads(line) for line in ran.out.splitlines()]


def imported(dsn: str, file: Path, *arguments: str) -> Ran:
    return mcp_pg_events("import", str(file), *arguments, MCP_PG_EVENTS_DSN=dsn)


def everything(dsn: str) -> list[Any]:
    """All rows, and all partitions."""
    tables = ("sessions", "streams", "events", "inbox")
    rows = [query(dsn, sql.SQL("SELECT * FROM {}").format(sql.Identifier(table))) for table in tables]
    return [*map(sorted, rows[1:]), sorted(map(str, rows[0])), partitions(dsn)]


async def a_session(dsn: str, *, owner: str | None = '"ann"') -> tuple[str, int, int]:
    """A session with a call that ended, one that runs, and a message in the standalone stream: id, and both streams."""
    async with running(dsn, 1) as (store,):
        key, opened = await open_session(store, owner=owner)
        done, runs = await open_call(store, key, 1), await open_call(store, key, 2)
        for stream in (done, runs, standalone(key, opened)):
            await store.log.append(stream, NOTE)
        await store.log.append(done, ODD.encode(), final=True)
        query(dsn, "UPDATE workers SET ended_at = NULL")
        # The store's own end would give the running call its final.
        query(dsn, "CREATE TABLE kept AS SELECT * FROM streams")
        number_done, number_runs = done.number, runs.number
    query(dsn, "DELETE FROM events WHERE stream = %s AND seq > 1", number_runs)
    query(dsn, "UPDATE streams SET final_seq = NULL, ended_at = NULL, worker = 1 WHERE number = %s", number_runs)
    query(dsn, "DROP TABLE kept")
    return key.session_id, number_done, number_runs


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
        from mcp_pg_events.backend import SessionKey

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
        from mcp_pg_events.backend import Stream

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


async def test_a_file_that_is_cut_anywhere_changes_nothing(migrated: str, other: str, tmp_path: Path) -> None:
    session, _, _ = await a_session(migrated)
    exported(migrated, session, tmp_path / "file")
    whole = (tmp_path / "file").read_text()
    before = everything(other)
    lines = whole.splitlines(keepends=True)
    cuts = {whole[:length] for length in (*range(0, len(whole) - 1, 997), len(whole) - 3)}
    cuts |= {"".join(lines[:count]) for count in range(len(lines))}
    cuts |= {"".join(lines[:at] + lines[at + 1 :]) for at in range(len(lines))}
    for cut in sorted(cuts):
        (tmp_path / "cut").write_text(cut)
        ran = imported(other, tmp_path / "cut")
        assert (ran.code, ran.out) == (1, ""), cut[-200:]
        assert ran.err.startswith("mcp-pg-events: ") and ran.err.count("\n") == 1
        assert everything(other) == before
    assert imported(other, tmp_path / "file").code == 0


@pytest.mark.parametrize(
    ("line", "change", "says"),
    [
        (0, {"version": 2}, "has version 2 of the format"),
        (0, {"format": "other"}, "is no export of a session"),
        (0, {"session": None}, "other fields than the session"),
        (1, {"number": 2**53}, "has a number that cannot be"),
        (1, {"number": True}, "has a number that cannot be"),
        (1, {"floor": -1}, "has a floor that cannot be"),
        (1, {"created_at": "2026-01-01"}, "has a created_at that cannot be"),
        (1, {"created_at": "0001-01-01T00:00:00+00:00"}, "has a created_at that cannot be"),
        (-2, {"created_at": "9999-12-31T23:59:59+00:00"}, "has a created_at that cannot be"),
        (1, {"method": "a\0b"}, "has a method that cannot be"),
        (1, {"method": "\ud800"}, "has a method that cannot be"),
        (1, {"more": 1}, "other fields than the stream"),
        (1, {"request_id": None, "request_key": "x"}, "half an id"),
        (1, {"shared": 1}, "has a shared that cannot be"),
        (-2, {"stream": 99}, "an event of a stream that it does not have"),
        (-2, {"seq": 0}, "before its beginning"),
        (-3, {"seq": 99}, "after the end of its stream"),
        (-1, {"events": 4}, "and says that it has"),
        (-1, {"type": "stream"}, "in the wrong place"),
        (-1, {"type": "other"}, "none that an export wrote"),
    ],
)
async def test_a_file_that_was_changed_is_refused(
    migrated: str, other: str, tmp_path: Path, line: int, change: dict[str, Any], says: str
) -> None:
    session, done, _ = await a_session(migrated)
    lines = exported(migrated, session, tmp_path / "file")
    if change == {"seq": 99}:
        line = max(at for at, each in enumerate(lines) if each.get("stream") == done)
    lines[line] |= change
    (tmp_path / "file").write_text("".join(json.dumps(each) + "\n" for each in lines))
    before = everything(other)
    ran = imported(other, tmp_path / "file")
    assert (ran.code, ran.out) == (1, "")
    assert says in ran.err
    assert everything(other) == before


@pytest.mark.parametrize("copies", [("header", 0), ("stream", 1), ("event", -2)])
async def test_a_line_that_comes_twice_is_refused(
    migrated: str, other: str, tmp_path: Path, copies: tuple[str, int]
) -> None:
    session, _, _ = await a_session(migrated)
    lines = exported(migrated, session, tmp_path / "file")
    lines.insert(lines.index(lines[copies[1]]), lines[copies[1]])
    (tmp_path / "file").write_text("".join(json.dumps(each) + "\n" for each in lines))
    ran = imported(other, tmp_path / "file")
    assert ran.code == 1
    assert ("in the wrong place" if copies[0] == "header" else "one id twice") in ran.err


async def test_ids_that_are_taken_are_refused(migrated: str, other: str, tmp_path: Path) -> None:
    session, done, _ = await a_session(migrated)
    exported(migrated, session, tmp_path / "file")
    for taken, says in (
        ("INSERT INTO sessions (id, server) VALUES (%s, 'x')", "There is a session"),
        ("INSERT INTO streams (session_id) VALUES (%s)", "There is a session"),
        (
            "INSERT INTO streams (number, session_id) OVERRIDING SYSTEM VALUE VALUES (%s::bigint, 'x')",
            f"Stream {done} of the file",
        ),
        ("INSERT INTO events (stream, seq, payload) VALUES (%s::bigint, 1, 'x')", f"Stream {done} of the file"),
    ):
        query(other, taken, session if "session_id) VALUES" in taken or "(id" in taken else str(done))
        before = everything(other)
        ran = imported(other, tmp_path / "file")
        assert (ran.code, ran.out) == (1, "")
        assert says in ran.err
        assert everything(other) == before
        query(other, "DELETE FROM sessions")
        query(other, "DELETE FROM streams")
        query(other, "DELETE FROM events")
    assert imported(other, tmp_path / "file").code == 0
    ran = imported(other, tmp_path / "file")
    assert (ran.code, "There is a session" in ran.err) == (1, True)


async def test_past_events_get_partitions_or_count_as_expired(migrated: str, other: str, tmp_path: Path) -> None:
    age(migrated)
    session, done, runs = await a_session(migrated)
    grow_old(migrated, done, 1, 9)
    grow_old(migrated, runs, 1, 3)
    exported(migrated, session, tmp_path / "file")
    before = everything(other)
    async with running(other, 1) as (store,):
        from mcp_pg_events.backend import SessionKey

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
    old = partitions(other)[3]
    with psycopg.connect(other) as reader, psycopg.connect(other, autocommit=True) as job:
        reader.execute("SELECT count(*) FROM mcp_events.events")
        job.execute("SET lock_timeout = '100ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            job.execute(
                sql.SQL("ALTER TABLE mcp_events.events DETACH PARTITION {} CONCURRENTLY").format(
                    sql.Identifier("mcp_events", old)
                )
            )
    ran = imported(other, tmp_path / "file", "--json")
    assert ran.code == 0, ran
    assert json.loads(ran.out)["expired"] == 1
    assert query(other, "SELECT floor FROM streams WHERE number = %s", done) == [(1,)]


async def test_while_a_retention_pass_runs_nothing_is_imported(migrated: str, other: str, tmp_path: Path) -> None:
    session, _, _ = await a_session(migrated)
    exported(migrated, session, tmp_path / "file")
    with psycopg.connect(other) as job:
        job.execute(
            "SELECT pg_advisory_lock(hashtextextended('mcp_pg_events.retention', "
            "'mcp_events.events'::regclass::oid::bigint))"
        )
        ran = imported(other, tmp_path / "file")
    assert (ran.code, ran.out) == (1, "")
    assert "A retention pass runs" in ran.err


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


async def test_the_role_of_a_worker_may_export_and_not_import(migrated: str, tmp_path: Path) -> None:
    session, _, _ = await a_session(migrated)
    role = f"transfer_{database_name(migrated)}"
    query(migrated, sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(sql.Identifier(role), sql.Literal(PASSWORD)))
    try:
        migrate.upgrade(migrated, worker_role=role)
        as_role = dsn_url(migrated, user=role, password=PASSWORD)
        exported(as_role, session, tmp_path / "file")
        query(migrated, "DELETE FROM events")
        query(migrated, "DELETE FROM streams")
        query(migrated, "DELETE FROM sessions")
        ran = imported(as_role, tmp_path / "file")
        assert (ran.code, ran.out) == (1, "")
        assert "lacks a right" in ran.err and "use the role that owns the tables" in ran.err
        assert imported(migrated, tmp_path / "file").code == 0
    finally:
        query(migrated, sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        query(migrated, sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"[1]\n", b'{"type":"end"}\n', b"{" * 100000])
def test_what_is_no_export_is_said_in_a_sentence(migrated: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    ran = imported(migrated, tmp_path / "file")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("mcp-pg-events: ") and ran.err.count("\n") == 1
    ran = imported(migrated, tmp_path / "nowhere")
    assert (ran.code, "cannot be read (No such file or directory)" in ran.err) == (1, True)
