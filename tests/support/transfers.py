"""A session to take from one database to another, and the two commands for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from psycopg import sql

from tests.support.command import Ran, mcp_pg_events
from tests.support.log import NOTE, open_call, open_session, partitions, query, running, standalone

ODD = '{"jsonrpc":"2.0","id":1,"result":{"text":"\\u0000 \\ud800 é \u2028 👩‍👩‍👧‍👦 \\u001b[2J"}}'


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


async def a_session(dsn: str) -> tuple[str, int, int]:
    """Ann's, with a call that ended, one that runs, and a message in the standalone stream: its id, and both calls."""
    async with running(dsn, 1) as (store,):
        key, opened = await open_session(store, owner='"ann"')
        done, runs = await open_call(store, key, 1), await open_call(store, key, 2)
        for stream in (done, runs, standalone(key, opened)):
            await store.log.append(stream, NOTE)
        await store.log.append(done, ODD.encode(), final=True)
        query(dsn, "UPDATE workers SET ended_at = NULL")
    # The store's own end has given the running call its final.
    query(dsn, "DELETE FROM events WHERE stream = %s AND seq > 1", runs.number)
    query(dsn, "UPDATE streams SET final_seq = NULL, ended_at = NULL, worker = 1 WHERE number = %s", runs.number)
    return key.session_id, done.number, runs.number
