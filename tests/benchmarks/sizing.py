"""Bytes on disk, indexes and TOAST included: per event by the size of its message, per call, per session.

The messages are stored as a durable app stores them, from 50 calls at once, and their text does not compress, like most
of what a tool returns does not below 2 kB; PostgreSQL compresses longer text that does. What is measured is what the
tables have grown by when autovacuum has had its turn.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
from uuid import uuid4

import psycopg

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import SessionKey, Stream
from tests.benchmarks.environment import Bench
from tests.benchmarks.figures import OURS, Report

TITLE = "Bytes on disk"
SIZES = (100, 250, 1000, 4000, 16000)
CALLERS = 50
INITIALIZE = json.dumps(
    {
        "protocolVersion": "2025-11-25",
        "capabilities": {"sampling": {}, "elicitation": {}, "roots": {"listChanged": True}},
        "clientInfo": {"name": "example-client", "title": "Example client", "version": "1.4.2"},
    }
)
RESULT = b'{"jsonrpc":"2.0","id":1,"result":{}}'

EVENTS = "SELECT sum(pg_total_relation_size(relid)) FROM pg_partition_tree('mcp_events.events')"
TABLE = "SELECT pg_total_relation_size(('mcp_events.' || %s)::regclass)"
WAL = "SELECT pg_current_wal_insert_lsn() - '0/0'"


def run(bench: Bench, report: Report) -> None:
    for _ in range(bench.rounds):
        for size in SIZES:
            count = min(100_000, 100_000_000 // size) // (20 if bench.short else 1)
            with bench.database() as dsn:
                asyncio.run(_events(report, dsn, size, count, CALLERS))
        with bench.database() as dsn:
            asyncio.run(_events(report, dsn, 250, 3000 if bench.short else 10_000, 1))
        with bench.database() as dsn:
            asyncio.run(_calls(report, dsn, 1000 if bench.short else 20_000))
        with bench.database() as dsn:
            asyncio.run(_sessions(report, dsn, 500 if bench.short else 10_000))


async def _events(report: Report, dsn: str, size: int, count: int, callers: int) -> None:
    count -= count % callers
    async with PostgresStore(dsn) as store:
        key = await _open(store)
        streams = [await _call(store, key, number) for number in range(callers)]
        before, wal = _ask(dsn, EVENTS), _ask(dsn, WAL)

        async def call(number: int, stream: Stream) -> None:
            for _ in range(count // callers):
                await store.log.append(stream, message(number, size))

        async with asyncio.TaskGroup() as tasks:
            for number, stream in enumerate(streams):
                tasks.create_task(call(number, stream))
        written, grown = _ask(dsn, WAL) - wal, _settled(dsn, EVENTS) - before
        case = f"an event of {size:,} bytes" + (", the only call" if callers == 1 else "")
        report.add(case, OURS, disk_bytes=grown / count, WAL_bytes=written / count)


async def _calls(report: Report, dsn: str, count: int) -> None:
    """Its row in `streams`, which is made with the call and ended with it; the WAL also of its result, an event of 36
    bytes."""
    async with PostgresStore(dsn) as store:
        key = await _open(store)
        before, wal = _ask(dsn, TABLE, "streams"), _ask(dsn, WAL)

        async def calls(caller: int) -> None:
            for number in range(count // CALLERS):
                await store.log.append(await _call(store, key, caller * count + number), RESULT, final=True)

        async with asyncio.TaskGroup() as tasks:
            for caller in range(CALLERS):
                tasks.create_task(calls(caller))
        written, grown = _ask(dsn, WAL) - wal, _settled(dsn, TABLE, "streams") - before
        report.add("a call, beside its events", OURS, disk_bytes=grown / count, WAL_bytes=written / count)


async def _sessions(report: Report, dsn: str, count: int) -> None:
    """Its row in `sessions`, and its two streams: the standalone one and that of `initialize`."""
    async with PostgresStore(dsn) as store:
        tables = ("sessions", "streams")
        before, wal = [_ask(dsn, TABLE, table) for table in tables], _ask(dsn, WAL)

        async def sessions() -> None:
            for _ in range(count // CALLERS):
                await _open(store)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(CALLERS):
                tasks.create_task(sessions())
        written = _ask(dsn, WAL) - wal
        grown = sum(_settled(dsn, TABLE, table) for table in tables) - sum(before)
        report.add("a session, with its two streams", OURS, disk_bytes=grown / count, WAL_bytes=written / count)


async def _open(store: PostgresStore) -> SessionKey:
    key = SessionKey(uuid4().hex, "server", None, None)
    opened = await store.log.open_session(
        key, initialize=INITIALIZE, protocol_version="2025-11-25", request_id="0", request_key="i0", limit=None
    )
    await store.log.append(opened.stream, RESULT, final=True)
    return key


async def _call(store: PostgresStore, key: SessionKey, number: int) -> Stream:
    call = await store.log.open_stream(
        key, request_id=str(number), request_key=f"i{number}", method="tools/call", restore=False
    )
    return call.stream


def message(number: int, size: int) -> bytes:
    """A notification of `size` bytes."""
    text = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": number, "message": ""}}
    frame = json.dumps(text, separators=(",", ":"))
    # 64 letters, so that nothing of it repeats.
    filling = "".join(random.choices(string.ascii_letters + string.digits + "-_", k=max(0, size - len(frame))))
    return frame.replace('"message":""', f'"message":"{filling}"').encode()


def _ask(dsn: str, statement: str, *values: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(statement, values or None).fetchone()  # type: ignore[call-overload]  # text of this module
        assert row is not None
        return int(row[0])


def _settled(dsn: str, statement: str, *values: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    return _ask(dsn, statement, *values)
