"""Storing events from many callers at once, each acknowledged after its commit.

A caller has a stream of its own and stores the next event when the last is stored. Ours is measured twice: the way a
`durable` app stores what a call sends, and through `for_session`, the SDK's `EventStore` interface, which the peers
have. mcp-persist's `BatchingEventStore` is left out: it acknowledges before the commit. The SDK's in-memory pattern and
FastMCP's event store (on its default, memory) keep nothing, and stand for what an event costs without a disk. The
yardstick at 500 callers is one COPY of such rows into the same table, which acknowledges nothing until its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import Awaitable, Callable
from uuid import uuid4

import psycopg
from mcp.server.streamable_http import EventStore
from mcp_persist import PostgresEventStore
from mcp_types import JSONRPCMessage, JSONRPCNotification

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import SessionKey
from tests.benchmarks.apps import MemoryEventStore
from tests.benchmarks.environment import Bench
from tests.benchmarks.figures import FASTMCP, MEMORY, OURS, PERSIST, Chart, Report, percentile, rotated

TITLE = "Storing events"
FOR_SESSION = f"{OURS}, for_session"
COPY = "one COPY"

Store = Callable[[int, JSONRPCMessage], Awaitable[object]]
"""Stores a caller's next event."""


def message(caller: int, number: int) -> JSONRPCMessage:
    """A progress notification of about 250 bytes."""
    params = {"progressToken": caller, "progress": number, "total": 1000, "message": f"Step {number} " + "x" * 130}
    return JSONRPCNotification(jsonrpc="2.0", method="notifications/progress", params=params)


def run(bench: Bench, report: Report) -> None:
    logging.getLogger("mcp_persist").setLevel(logging.ERROR)
    with bench.database() as dsn:
        asyncio.run(_run(bench, report, dsn))
    for callers, target in ((1, 1.2), (10, 0.0), (100, 10), (500, 10)):
        case = f"{callers} caller{'s' * (callers > 1)}"
        if (case, PERSIST, "rate_per_s") not in report.values:
            continue
        if target:
            ours, peer = (case, OURS, "rate_per_s"), (case, PERSIST, "rate_per_s")
            report.compare(f"rate, {case}", ours, peer, "at least", target)
        if callers >= 100:
            ours, peer = (case, OURS, "p99_ms"), (case, PERSIST, "p99_ms")
            report.compare(f"p99, {case}", ours, peer, "at most", 0.05)
    if not bench.short:
        ours, yardstick = ("500 callers", OURS, "rate_per_s"), ("500 callers", COPY, "rate_per_s")
        report.compare("rate, 500 callers, against one COPY", ours, yardstick, "at least", 0.3)
    report.charts.append(Chart("Storing, events per second", "rate_per_s", logarithmic=True))
    report.charts.append(Chart("Storing, p99 in milliseconds", "p99_ms", logarithmic=True))


async def _run(bench: Bench, report: Report, dsn: str) -> None:
    seconds = 0.7 if bench.short else 2.0
    counts = (100,) if bench.short else (1, 10, 100, 500)
    async with PostgresStore(dsn) as store, PostgresEventStore.create(dsn, table_name="peer_events", ttl=3600) as peer:
        subjects: dict[str, Callable[[int], Awaitable[Store]]] = {
            OURS: lambda callers: own_streams(store, callers),
            FOR_SESSION: lambda callers: _for_session(store),
            PERSIST: lambda callers: _peer(peer),
        }
        if not bench.short:
            subjects[MEMORY] = lambda callers: _peer(MemoryEventStore())
            with contextlib.suppress(ImportError):
                from fastmcp.server.event_store import EventStore as FastMCPEventStore

                subjects[FASTMCP] = lambda callers: _peer(FastMCPEventStore())
        for turn in range(bench.rounds):
            for callers in counts:
                for subject in rotated(list(subjects), turn):
                    case = f"{callers} caller{'s' * (callers > 1)}"
                    rate, taken, used = await drive(await subjects[subject](callers), callers, seconds)
                    report.add(
                        case,
                        subject,
                        rate_per_s=rate,
                        p50_ms=percentile(taken, 0.5) * 1e3,
                        p99_ms=percentile(taken, 0.99) * 1e3,
                        cpu_us=used * 1e6,
                    )
            if not bench.short:
                report.add("500 callers", COPY, rate_per_s=await asyncio.to_thread(_copy, dsn, turn))


async def own_streams(store: PostgresStore, callers: int) -> Store:
    key = SessionKey(uuid4().hex, "benchmark", None, None)
    await store.log.open_session(
        key, initialize="{}", protocol_version="2025-11-25", request_id="0", request_key="i0", limit=None
    )
    streams = []
    for caller in range(callers):
        call = await store.log.open_stream(
            key, request_id=str(caller + 1), request_key=f"i{caller + 1}", method="tools/call", restore=False
        )
        streams.append(call.stream)

    async def one(caller: int, event: JSONRPCMessage) -> int:
        return await store.log.append(
            streams[caller], event.model_dump_json(by_alias=True, exclude_unset=True).encode()
        )

    return one


async def _for_session(store: PostgresStore) -> Store:
    events = store.for_session(uuid4().hex)
    return lambda caller, event: events.store_event(str(caller), event)


async def _peer(peer: EventStore) -> Store:
    prefix = uuid4().hex
    return lambda caller, event: peer.store_event(f"{prefix}-{caller}", event)


async def drive(store: Store, callers: int, seconds: float) -> tuple[float, list[float], float]:
    """Events per second, the seconds that each took, and this process's processor time for one, after a warm-up."""
    clock = time.perf_counter
    await asyncio.gather(*(store(caller, message(caller, 0)) for caller in range(callers)))
    gc.collect()
    taken: list[float] = []
    used = time.process_time()
    start = clock()
    end = start + seconds

    async def call(caller: int) -> None:
        number = 0
        while (begun := clock()) < end:
            number += 1
            await store(caller, message(caller, number))
            taken.append(clock() - begun)

    await asyncio.gather(*(call(caller) for caller in range(callers)))
    return len(taken) / (clock() - start), taken, (time.process_time() - used) / len(taken)


def _copy(dsn: str, turn: int, rows: int = 100_000) -> float:
    payload = message(1, 1).model_dump_json(by_alias=True)
    with psycopg.connect(dsn, autocommit=True) as connection:
        start = time.perf_counter()
        with connection.cursor().copy("COPY mcp_events.events (stream, seq, payload) FROM STDIN") as copy:
            for number in range(rows):
                copy.write_row((1_000_000_000 + turn * 500 + number % 500, number, payload))
        return rows / (time.perf_counter() - start)
