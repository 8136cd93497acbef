"""Replay: a client that comes back after the end of a call with 1,000 or 100,000 events, and reads them all.

The call is a real one of a single event; SQL copies that event to the length wanted, alike for both subjects. Memory is
what the worker held at most, above what it held before.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import psycopg

from tests.benchmarks.environment import Bench, workers
from tests.benchmarks.figures import OURS, PERSIST, Chart, Report, rotated
from tests.benchmarks.wire import Client, start_calls

TITLE = "Replay of a call that has ended"
FINAL = b"poured"

LENGTHEN = {
    OURS: """
        WITH moved AS (UPDATE mcp_events.events SET seq = %(events)s + 1 WHERE stream = %(stream)s AND seq = 2),
             ended AS (UPDATE mcp_events.streams SET final_seq = %(events)s + 1 WHERE number = %(stream)s)
        INSERT INTO mcp_events.events (stream, seq, payload)
        SELECT stream, number, payload FROM mcp_events.events, generate_series(2, %(events)s) number
         WHERE stream = %(stream)s AND seq = 1
    """,
    PERSIST: """
        WITH call AS (
            SELECT * FROM mcp_events WHERE stream_id = (SELECT stream_id FROM mcp_events WHERE event_id = %(stream)s)
        ), final AS (DELETE FROM mcp_events WHERE event_id = (SELECT max(event_id) FROM call) RETURNING *)
        INSERT INTO mcp_events (stream_id, payload, created_at)
        SELECT stream_id, payload, created_at FROM (
            SELECT call.*, number FROM call, generate_series(2, %(events)s) number
             WHERE event_id = %(stream)s + 1 UNION ALL
            SELECT final.*, 1000000000 FROM final
        ) events ORDER BY number
    """,
}


def run(bench: Bench, report: Report) -> None:
    counts = (1000,) if bench.short else (1000, 100_000)
    with bench.database() as dsn, contextlib.ExitStack() as stack:
        running = {subject: stack.enter_context(workers(subject, dsn))[0] for subject in (OURS, PERSIST)}
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        for count in counts:
            ended = {}
            for subject, worker in running.items():
                client = Client(worker.url, subject)
                client.call("go").finish()
                (call,) = start_calls([client], "pour", [{"n": 1, "size": 150}])
                call.finish()
                cursor = call.event_id()
                stream = int(cursor.partition("-")[0])
                connection.execute(LENGTHEN[subject], {"stream": stream, "events": count})
                ended[subject] = client, cursor
            connection.execute("VACUUM ANALYZE")
            for turn in range(bench.rounds):
                for subject in rotated((OURS, PERSIST), turn):
                    worker = running[subject]
                    if count == 1000:
                        read_again(*ended[subject], count)
                    worker.forget_peak()
                    held = worker.resident()
                    rates = [read_again(*ended[subject], count) for _ in range(10 if count == 1000 else 1)]
                    grown = (worker.peak() - held) / 1e6
                    report.add(_case(count), subject, rate_per_s=statistics.median(rates), memory_MB=max(0.0, grown))
    ours, peer = (_case(1000), OURS, "rate_per_s"), (_case(1000), PERSIST, "rate_per_s")
    report.compare("rate, 1,000 events", ours, peer, "at least", 1)
    if 100_000 in counts:
        report.bound("memory, 100,000 events", (_case(100_000), OURS, "memory_MB"), "at most", 32, "MB")
    report.charts.append(Chart("Replay, events per second", "rate_per_s"))


def _case(count: int) -> str:
    return f"{count:,} events"


def read_again(client: Client, cursor: str, count: int) -> float:
    """Events per second from the request to the final response."""
    start = time.perf_counter()
    stream = client.get(cursor)
    # The SDK's transport does not end a resumed response, so the final is the end of the measurement.
    stream.until(lambda data: data.find(FINAL, max(0, len(data) - 100_000)) >= 0)
    taken = time.perf_counter() - start
    stream.close()
    arrived = stream.data.count(b"notifications/progress")
    if arrived != count:
        raise RuntimeError(f"{arrived} of {count} events arrived")
    return count / taken
