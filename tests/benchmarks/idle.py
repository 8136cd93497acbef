"""Idle streams: standalone GETs on one worker that nothing is sent on, and what each costs.

The sessions were opened on the other worker, so that a GET is all that this one sees of them. The floor is Starlette
alone with a response that sends a comment every 15 seconds.
"""

from __future__ import annotations

import contextlib
import time

import psycopg

from tests.benchmarks.apps import BARE_SSE
from tests.benchmarks.environment import Bench, Worker, workers
from tests.benchmarks.figures import OURS, Chart, Report, rotated
from tests.benchmarks.wire import Client, Stream

TITLE = "Idle attached streams"

SESSIONS = """
    WITH session AS (
        INSERT INTO mcp_events.sessions (id, server, owner, initialize, protocol_version)
        SELECT id || '-' || n, server, owner, initialize, protocol_version
          FROM mcp_events.sessions, generate_series(1, %(count)s) n WHERE id = %(session)s RETURNING id
    )
    INSERT INTO mcp_events.streams (session_id) SELECT id FROM session
"""
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'mcp_pg_events%'"


def run(bench: Bench, report: Report) -> None:
    count = 200 if bench.short else 5000
    case = f"{count:,} streams"
    for turn in range(bench.rounds):
        for subject in rotated((OURS, BARE_SSE), turn):
            with bench.database() as dsn, psycopg.connect(dsn, autocommit=True) as connection:
                if subject == BARE_SSE:
                    with workers(BARE_SSE, dsn) as (worker,):
                        report.add(case, subject, **attached(bench, worker, [{}] * count))
                    continue
                with workers(OURS, dsn, 2) as (opener, worker):
                    client = Client(opener.url, OURS)
                    connection.execute(SESSIONS, {"count": count + 1, "session": client.session_id})
                    headers = client.headers | {"Accept": "text/event-stream"}
                    each = [headers | {"Mcp-Session-Id": f"{client.session_id}-{n + 1}"} for n in range(count + 1)]
                    figures = attached(bench, worker, each[:-1], each[-1])
                    row = connection.execute(CONNECTIONS).fetchone()
                    assert row is not None
                    report.add(case, subject, **figures, connections=row[0] / 2)
    memory, floor = (report.values[case, subject, "memory_kB"] for subject in (OURS, BARE_SSE))
    for ours, bare in zip(memory, floor, strict=True):
        report.add(case, "difference", memory_kB=ours - bare)
    report.bound("memory above a bare stream's", (case, "difference", "memory_kB"), "at most", 10, "kB")
    report.bound("connections, a worker", (case, OURS, "connections"), "at most", 10, "")
    report.charts.append(Chart("Memory of an idle stream, kB", "memory_kB"))


def attached(
    bench: Bench, worker: Worker, requests: list[dict[str, str]], first: dict[str, str] | None = None
) -> dict[str, float]:
    """Kilobytes that each attached stream adds to the worker, and what worker and database then do in idleness."""
    with contextlib.ExitStack() as stack:

        def attach(headers: dict[str, str]) -> Stream:
            stream = stack.enter_context(contextlib.closing(Stream(worker.url, "GET", "/mcp", headers)))
            stream.head()
            return stream

        # What the first request loads is no stream's.
        attach(first or {})
        time.sleep(0.5)
        before = worker.resident()
        for headers in requests:
            attach(headers)
        time.sleep(0.5)
        memory = (worker.resident() - before) / 1000 / len(requests)
        seconds = 2 if bench.short else 10
        used, used_database = worker.cpu(), bench.database_cpu()
        time.sleep(seconds)
        return {
            "memory_kB": memory,
            "worker_cpu_percent": (worker.cpu() - used) / seconds * 100,
            "database_cpu_percent": (bench.database_cpu() - used_database) / seconds * 100,
        }
