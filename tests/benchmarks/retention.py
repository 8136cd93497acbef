"""Letting ten million expired events go, while sixteen streams are busy.

The events are in ten partitions of a day each, a hundred to a stream, whose calls have ended. The job runs as from
cron, in a process of its own; `pass` is the time that it reports, `job` that of the process. First a reader sits in a
transaction that has read the log: the job then has to leave with 75, and nobody may wait for it. mcp-persist's
`purge_expired` deletes as many rows of the same length, from a table of its own, while the same callers store there.
The disk's figures are the events' tables with their indexes and TOAST.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import psycopg
from mcp_persist import PostgresEventStore

from mcp_pg_events import PostgresStore
from tests.benchmarks.environment import ROOT, Bench
from tests.benchmarks.figures import OURS, PERSIST, Chart, Report
from tests.benchmarks.storing import Store, message, own_streams

TITLE = "Dropping expired events"
BUSY = 16
TRY_AGAIN = 75
DAYS = range(10, 20)
"""How many days ago the events were stored."""

PARTITIONS = """
    SELECT format('CREATE TABLE mcp_events.events_p%%s PARTITION OF mcp_events.events FOR VALUES FROM (%%L) TO (%%L)',
                  to_char(day, 'YYYYMMDDHH24'), day, day + interval '1 day')
      FROM unnest(%s::integer[]) n, LATERAL (SELECT date_trunc('day', now()) - n * interval '1 day' AS day) days
"""
_MOMENT = "date_trunc('day', now()) - (%(first)s + n %% %(days)s) * interval '1 day' + interval '12 hours'"
STREAMS = f"""
    INSERT INTO mcp_events.streams (session_id, request_id, request_key, worker, final_seq, created_at, ended_at)
    SELECT 'expired', n::text, 'i' || n, 1, 100, {_MOMENT}, {_MOMENT} FROM generate_series(1, %(streams)s) n
    RETURNING number
"""
EVENTS = """
    INSERT INTO mcp_events.events (stream, seq, created_at, payload)
    SELECT t.number, seq, t.created_at, %(payload)s
      FROM mcp_events.streams t, generate_series(1, 100) seq WHERE t.session_id = 'expired'
"""
PEER = """
    INSERT INTO peer_events (stream_id, payload, created_at)
    SELECT 'expired-' || n / 100, %(payload)s, extract(epoch FROM now()) - 864000 FROM generate_series(1, %(events)s) n
"""
SIZE = """
    SELECT coalesce(sum(pg_total_relation_size(c.oid)), 0) FROM pg_class c
     WHERE c.relkind = 'r' AND (c.relname LIKE 'events_p%%' OR c.relname = 'peer_events')
"""


def run(bench: Bench, report: Report) -> None:
    logging.getLogger("mcp_persist").setLevel(logging.ERROR)
    events = 200_000 if bench.short else 10_000_000
    case = f"{events:,} events"
    for _ in range(1 if events > 1_000_000 else bench.rounds):
        with bench.database() as dsn:
            asyncio.run(_ours(report, dsn, case, events))
        with bench.database() as dsn:
            asyncio.run(_peer(report, dsn, case, events))
    if not bench.short:
        report.bound("a pass", (case, OURS, "pass_s"), "at most", 2, "s")
        report.bound("slowest append meanwhile", (case, OURS, "slowest_append_ms"), "at most", 250, "ms")
        held = (f"{case}, held by a reader", OURS, "slowest_append_ms")
        report.bound("slowest append, held by a reader", held, "at most", 250, "ms")
        report.compare(
            "disk after, against before", (case, OURS, "after_mb"), (case, OURS, "before_mb"), "at most", 0.1
        )
    report.notes.append("Ten million rows take minutes to make, so that there is one round of them.")
    report.charts.append(Chart("Letting expired events go, in seconds", "job_s", logarithmic=True))


async def _ours(report: Report, dsn: str, case: str, events: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        # Nobody waits for these commits; those that are measured are other connections'.
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET timezone = 'UTC'")
        for (statement,) in connection.execute(PARTITIONS, (list(DAYS),)).fetchall():
            connection.execute(statement)
        connection.execute(STREAMS, {"streams": events // 100, "first": DAYS[0], "days": len(DAYS)})
        connection.execute(EVENTS, {"payload": _payload()})
        _settle(connection)
    async with PostgresStore(dsn) as store:
        append = await own_streams(store, BUSY)
        async with _busy(append) as taken:
            await asyncio.sleep(3)
        report.add(f"{case}, nothing else runs", OURS, slowest_append_ms=max(taken) * 1e3)

        with psycopg.connect(dsn) as reader:
            reader.execute("SELECT count(*) FROM mcp_events.events WHERE stream = 1")
            async with _busy(append) as taken:
                code, _, seconds = await _job(dsn)
        if code != TRY_AGAIN:
            raise RuntimeError(f"with a reader in a transaction the job left with {code}, not {TRY_AGAIN}")
        report.add(f"{case}, held by a reader", OURS, job_s=seconds, slowest_append_ms=max(taken) * 1e3)

        before = _megabytes(dsn)
        async with _busy(append) as taken:
            code, said, seconds = await _job(dsn)
        if code != 0:
            raise RuntimeError(f"the job left with {code}: {said}")
        report.add(
            case,
            OURS,
            pass_s=json.loads(said)["seconds"],
            job_s=seconds,
            slowest_append_ms=max(taken) * 1e3,
            before_mb=before,
            after_mb=_megabytes(dsn),
        )
    with psycopg.connect(dsn) as connection:
        left = connection.execute("SELECT count(*) FROM mcp_events.streams WHERE session_id = 'expired'").fetchone()
        if left != (0,):
            raise RuntimeError(f"{left} of the streams that ended are left")


async def _peer(report: Report, dsn: str, case: str, events: int) -> None:
    async with PostgresEventStore.create(dsn, table_name="peer_events", ttl=86400) as peer:
        with psycopg.connect(dsn, autocommit=True) as connection:
            connection.execute("SET synchronous_commit = off")
            connection.execute(PEER, {"payload": _payload(), "events": events})
            _settle(connection)
        prefix = uuid4().hex
        before = _megabytes(dsn)
        async with _busy(lambda caller, event: peer.store_event(f"{prefix}-{caller}", event)) as taken:
            begun = time.perf_counter()
            removed = await peer.purge_expired()
            seconds = time.perf_counter() - begun
        if removed != events:
            raise RuntimeError(f"mcp-persist removed {removed} of {events} events")
        report.add(
            case,
            PERSIST,
            pass_s=seconds,
            job_s=seconds,
            slowest_append_ms=max(taken) * 1e3,
            before_mb=before,
            after_mb=_megabytes(dsn),
        )


def _payload() -> str:
    return message(1, 1).model_dump_json(by_alias=True)


def _settle(connection: psycopg.Connection[object]) -> None:
    connection.execute("VACUUM ANALYZE")
    connection.execute("CHECKPOINT")


def _megabytes(dsn: str) -> float:
    with psycopg.connect(dsn) as connection:
        row = connection.execute(SIZE).fetchone()
        assert row is not None
        return float(row[0]) / 1e6


async def _job(dsn: str) -> tuple[int | None, str, float]:
    """Exit code, output and seconds of `mcp-pg-events retention`."""
    begun = time.perf_counter()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mcp_pg_events", "retention", "--ttl", "7d", "--json", "--dsn", dsn),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode(), time.perf_counter() - begun


@contextlib.asynccontextmanager
async def _busy(store: Store) -> AsyncIterator[list[float]]:
    """Callers that store one event after the other, and the seconds that each took."""
    taken: list[float] = []
    over = asyncio.Event()

    async def call(caller: int) -> None:
        number = 0
        while not over.is_set():
            number += 1
            begun = time.perf_counter()
            await store(caller, message(caller, number))
            taken.append(time.perf_counter() - begun)

    async with asyncio.TaskGroup() as tasks:
        for caller in range(BUSY):
            tasks.create_task(call(caller))
        try:
            yield taken
        finally:
            over.set()
