"""The log over PostgreSQL as tests drive it: several stores in one process stand for several workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, LiteralString
from uuid import uuid4

import psycopg

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import OpenedSession, SessionKey, Stream
from mcp_pg_events.worker import Worker

NOTE = b'{"jsonrpc":"2.0","method":"notifications/message","params":{}}'
RESULT = b'{"jsonrpc":"2.0","id":1,"result":{}}'
VERSION = "2025-11-25"


def parts(store: PostgresStore) -> Worker:
    """The running parts of a store: what a test has to look into, or to break."""
    return store._running_worker


@contextlib.asynccontextmanager
async def running(dsn: str, count: int, **options: Any) -> AsyncIterator[list[PostgresStore]]:
    """`count` stores on one database, each a worker of its own."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(PostgresStore(dsn, **options)) for _ in range(count)]


def query(dsn: str, statement: LiteralString | psycopg.sql.Composable, *parameters: Any) -> list[Any]:
    """Run a statement in the schema on another connection, outside any transaction; its rows."""
    with psycopg.connect(dsn, autocommit=True, options="-c search_path=mcp_events") as connection:
        cursor = connection.execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description else []


async def open_session(store: PostgresStore, *, owner: str | None = None) -> tuple[SessionKey, OpenedSession]:
    """A session whose `initialize` is answered."""
    key = SessionKey(uuid4().hex, "server", owner, None)
    opened = await store.log.open_session(
        key, initialize="{}", protocol_version=VERSION, request_id="0", request_key="i0", limit=None
    )
    await store.log.append(opened.stream, RESULT, final=True)
    return key, opened


async def open_call(store: PostgresStore, key: SessionKey, number: int = 1) -> Stream:
    """The stream of a request that `store` runs."""
    call = await store.log.open_stream(
        key, request_id=str(number), request_key=f"i{number}", method="tools/call", restore=False
    )
    return call.stream


def standalone(key: SessionKey, opened: OpenedSession) -> Stream:
    """The session's standalone stream, as each worker has an object of its own for it."""
    return Stream(opened.standalone, key.session_id, shared=True)


def numbered(caller: object, index: int, *, final: bool = False) -> bytes:
    """A payload that says whose it is."""
    return json.dumps({"caller": str(caller), "index": index, "result" if final else "method": ""}).encode()


def stored(dsn: str, stream: int) -> list[tuple[int, bytes]]:
    """What a stream holds, in the order of its numbers."""
    return [
        (seq, payload.encode())
        for seq, payload in query(dsn, "SELECT seq, payload FROM events WHERE stream = %s ORDER BY seq", stream)
    ]


def assert_streams_are_whole(dsn: str) -> None:
    """Invariant 1 for every stream: numbers 1, 2, 3 and so on, at most one final, and nothing after it."""
    rows = query(
        dsn,
        """
        SELECT t.number, t.final_seq, t.request_key IS NULL,
               array_agg(e.seq ORDER BY e.seq, e.created_at),
               array_agg(e.seq ORDER BY e.seq) FILTER (WHERE e.payload ~ '"(result|error)"')
          FROM streams t JOIN events e ON e.stream = t.number GROUP BY t.number
        """,
    )
    assert rows
    for number, final_seq, is_standalone, seqs, finals in rows:
        assert seqs == list(range(1, len(seqs) + 1)), f"stream {number} has the numbers {seqs}"
        if final_seq is not None:
            assert final_seq == len(seqs), f"stream {number} ended with {final_seq} and goes on to {len(seqs)}"
        if not is_standalone:
            assert finals == ([final_seq] if final_seq else None), f"stream {number}: finals {finals}, not {final_seq}"


def assert_no_deadlocks(dsn: str) -> None:
    """PostgreSQL broke none in this database: each costs a second, and one of the two its transaction."""
    if int(query(dsn, "SHOW server_version_num")[0][0]) >= 150000:
        query(dsn, "SELECT pg_stat_force_next_flush()")
    assert query(dsn, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()") == [(0,)]


def partitions(dsn: str) -> list[str]:
    """The names of the partitions of `events`, oldest first."""
    rows = query(
        dsn, "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'events'::regclass ORDER BY 1"
    )
    return [name for (name,) in rows]


def drop_partitions(dsn: str) -> None:
    for name in partitions(dsn):
        query(dsn, psycopg.sql.SQL("DROP TABLE {}").format(psycopg.sql.Identifier(name)))


async def until(condition: Callable[[], object]) -> None:
    """Wait for what only the database can tell."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 (nothing here is told when another process gets there)
            await asyncio.sleep(0.005)
