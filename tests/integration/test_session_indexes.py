"""Lists of sessions find their page by an index, however many sessions there are; making those indexes waits for nobody
long."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import tuple_row

from mcp_pg_events import migrate
from mcp_pg_events.operator.desk import Desk, open_desk
from mcp_pg_events.operator.sessions import Filter, listing, page
from mcp_pg_events.operator.statements.sessions import ERASE_EVENTS, SIZE_OF_SESSION
from mcp_pg_events.operator.statements.tail import TAIL_EVENTS
from mcp_pg_events.operator.statements.transfer import EXPORT_COUNTS, EXPORT_EVENTS
from tests.support.command import mcp_pg_events
from tests.support.log import query

SESSIONS = 30_000
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def full(migrated_once: str) -> str:
    """30,000 sessions, of which every third lives; one in 64 of these runs a call."""
    query(
        migrated_once,
        """
        INSERT INTO sessions (id, server, owner, created_at, seen_at, ended_at)
        SELECT md5(n::text), 'server', '"owner ' || n % 1000 || '"',
               timestamptz '2026-01-01 12:00Z' - n * interval '1 s', now() - n * interval '1 s',
               CASE WHEN n % 3 <> 0 THEN now() END
          FROM generate_series(1, 30000) n
        """,
    )
    query(
        migrated_once,
        """
        INSERT INTO streams (session_id, request_id, request_key, method, worker)
        SELECT id, '1', 'i1', 'tools/call', 1 FROM sessions WHERE ended_at IS NULL AND id < '04'
        """,
    )
    query(
        migrated_once,
        """
        INSERT INTO streams (session_id, request_id, request_key, method, final_seq)
        SELECT md5(n::text), '2', 'i2', 'tools/call', 1 FROM generate_series(1, 30000) n
        """,
    )
    query(migrated_once, "ANALYZE")
    return migrated_once


def plan_of(desk: Desk, wanted: Filter, after: str | None) -> str:
    statement, values = listing(desk, wanted, limit=50, after=after)
    with desk.connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(sql.SQL("EXPLAIN (ANALYZE, TIMING off) ") + statement, values)
        return "\n".join(line for (line,) in cursor.fetchall())


@pytest.mark.parametrize("pages", [0, 2])
@pytest.mark.parametrize(
    ("wanted", "index", "rows"),
    [
        (Filter(), "sessions_opened", 60),
        (Filter(state="all"), "sessions_created", 60),
        (Filter(state="ended"), "sessions_created", 100),
        (Filter(state="all", server="server"), "sessions_created", 60),
        (Filter(state="all", since=NOON - timedelta(hours=3), until=NOON - timedelta(hours=2)), "sessions_created", 60),
        (Filter(state="all", owner='"owner 7"'), "sessions_owner", 60),
        (Filter(owner='"owner 100"'), "sessions_owner", 60),
        (Filter(idle=timedelta(hours=8)), "sessions_(seen|opened|live)", 2000),
        (Filter(running=True), "sessions_(pkey|seen|opened|live)", 10100),
        (Filter(method="tools/call"), "sessions_(pkey|seen|opened|live)", 10100),
    ],
)
def test_a_page_reads_what_it_shows_and_little_more(
    full: str, wanted: Filter, index: str, rows: int, pages: int
) -> None:
    with open_desk(full, "mcp_events", "test") as desk:
        after = None
        for _ in range(pages):
            after = page(desk, wanted, limit=4, after=after).next
            assert after is not None
        explained = plan_of(desk, wanted, after)
    assert "Seq Scan on sessions" not in explained, explained
    assert re.search(rf"(Index|Bitmap).* {index}", explained), explained
    read = [int(n) for n in re.findall(r"(?:sessions s|on sessions_\w+).*\(actual rows=(\d+)", explained)]
    removed = [int(n) for n in re.findall(r"Rows Removed by (?:Filter|Join Filter): (\d+)", explained)]
    assert sum(removed) + max(read) <= rows, explained


@pytest.mark.parametrize("statement", [SIZE_OF_SESSION, TAIL_EVENTS, EXPORT_EVENTS, EXPORT_COUNTS, ERASE_EVENTS])
def test_events_of_a_session_are_found_by_their_streams(full: str, statement: LiteralString) -> None:
    query(full, "DELETE FROM events")
    query(
        full,
        "INSERT INTO events (stream, seq, payload) "
        "SELECT number, seq, repeat('x', 100) FROM streams, generate_series(1, 20) seq WHERE number % 3 = 0",
    )
    query(full, "ANALYZE events")
    [(session,)] = query(full, "SELECT session_id FROM streams WHERE number % 3 = 0 LIMIT 1")
    streams = [number for (number,) in query(full, "SELECT number FROM streams WHERE session_id = %s", session)]
    values = {
        **{"session": session, "streams": streams, "after": [0] * len(streams)},
        **{"bound": NOON, "limit": 100, "bytes": 10000, "characters": 100},
    }
    with open_desk(full, "mcp_events", "test") as desk, desk.connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(sql.SQL("EXPLAIN ") + desk.composed(statement), values)
        explained = "\n".join(line for (line,) in cursor.fetchall())
    [(partition,)] = query(full, "SELECT DISTINCT tableoid::regclass::text FROM events")
    assert partition in explained
    assert f"Seq Scan on {partition}" not in explained, explained


def test_the_migration_gives_up_soon_where_somebody_works_with_sessions(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    migrate.upgrade(database, revision="0007")
    with psycopg.connect(database) as worker:
        worker.execute("UPDATE mcp_events.sessions SET seen_at = now()")
        ran = mcp_pg_events("migrate", MCP_PG_EVENTS_DSN=database)
        assert (ran.code, ran.out) == (1, "")
        assert "PostgreSQL refused the migration: canceling statement due to lock timeout" in ran.err
        assert migrate.current(database) == "0007"
    query(database, "CREATE INDEX CONCURRENTLY sessions_created ON sessions (created_at, id)")
    migrate.upgrade(database)
    found = query(database, "SELECT indexname FROM pg_indexes WHERE tablename = 'sessions' AND indexname ~ '(ed|er)$'")
    assert {"sessions_created", "sessions_opened", "sessions_owner"} <= {name for (name,) in found}
    migrate.downgrade(database, revision="0007")
    migrate.upgrade(database)
