"""`mcp-pg-events import` of what it cannot take: it says so in a sentence, and nothing is changed at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mcp_pg_events import migrate
from tests.support.log import query
from tests.support.roles import login_role
from tests.support.transfers import a_session, everything, exported, imported

pytestmark = pytest.mark.anyio


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


async def test_the_role_of_a_worker_may_export_and_not_import(migrated: str, tmp_path: Path) -> None:
    session, _, _ = await a_session(migrated)
    with login_role(migrated) as (role, as_role):
        migrate.upgrade(migrated, worker_role=role)
        exported(as_role, session, tmp_path / "file")
        query(migrated, "DELETE FROM events")
        query(migrated, "DELETE FROM streams")
        query(migrated, "DELETE FROM sessions")
        ran = imported(as_role, tmp_path / "file")
        assert (ran.code, ran.out) == (1, "")
        assert "lacks a right" in ran.err and "use the role that owns the tables" in ran.err
        assert imported(migrated, tmp_path / "file").code == 0


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe", b"[1]\n", b'{"type":"end"}\n', b"{" * 100000])
def test_what_is_no_export_is_said_in_a_sentence(migrated: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    ran = imported(migrated, tmp_path / "file")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("mcp-pg-events: ") and ran.err.count("\n") == 1
    ran = imported(migrated, tmp_path / "nowhere")
    assert (ran.code, "cannot be read (No such file or directory)" in ran.err) == (1, True)
