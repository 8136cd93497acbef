"""Resume latency as the table grows: from 100,000 to 10 million events, and from 3 to 60 partitions.

A call of 20 events has ended; a client comes back with its first event id, and reads to the end of the response. The
events that the table is full of belong to other streams; with 3 partitions (today's, and two made ahead) they all share
the call's.
"""

from __future__ import annotations

import contextlib
import time

import psycopg

from tests.benchmarks.environment import Bench, workers
from tests.benchmarks.figures import OURS, Chart, Report, percentile, rotated
from tests.benchmarks.wire import Client, start_calls

TITLE = "Resuming as the table grows"
EVENTS = 20
MADE = 3

PARTITION = """
    SELECT format('CREATE TABLE mcp_events.events_p%%s PARTITION OF mcp_events.events FOR VALUES FROM (%%L) TO (%%L)',
                  to_char(day, 'YYYYMMDDHH24'), day, day + interval '1 day')
      FROM generate_series(1, %s) n, LATERAL (SELECT date_trunc('day', now()) - n * interval '1 day' AS day) days
"""
FILL = """
    INSERT INTO mcp_events.events (stream, seq, created_at, payload)
    SELECT 1000000000 + n / 100, n %% 100 + 1,
           now() - (n %% (%(days)s + 1)) * interval '1 day' - random() * (now() - date_trunc('day', now())),
           '{"jsonrpc":"2.0","method":"notifications/progress","params":{"progressToken":1,"progress":1,"message":"'
           || repeat('x', 100) || '"}}'
      FROM generate_series(1, %(events)s) n
"""
STREAMS = """
    INSERT INTO mcp_events.streams (session_id, request_id, request_key, worker, final_seq)
    SELECT 'full', n::text, 'i' || n, 1, 100 FROM generate_series(1, %s) n
"""


def run(bench: Bench, report: Report) -> None:
    sizes = [(10**4, 3), (10**5, 3)] if bench.short else [(10**5, 3), (10**6, 3), (10**7, 3), (10**6, 60)]
    with contextlib.ExitStack() as stack:
        ended = {}
        for events, partitions in sizes:
            dsn = stack.enter_context(bench.database())
            fill(dsn, events, partitions)
            (worker,) = stack.enter_context(workers(OURS, dsn))
            client = Client(worker.url, OURS)
            client.call("go").finish()
            (call,) = start_calls([client], "pour", [{"n": EVENTS, "size": 150}])
            call.finish()
            ended[events, partitions] = client, call.event_id()
            for _ in range(30):
                resume(*ended[events, partitions])
        for _ in range(bench.rounds):
            taken: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
            for turn in range(50 if bench.short else 200):
                for size in rotated(sizes, turn):
                    taken[size].append(resume(*ended[size]))
            for size in sizes:
                p50, p99 = percentile(taken[size], 0.5), percentile(taken[size], 0.99)
                report.add(_case(*size), OURS, p50_ms=p50, p99_ms=p99)
    small, large = (_case(*sizes[0]), OURS, "p50_ms"), (_case(*sizes[-2 if len(sizes) > 2 else -1]), OURS, "p50_ms")
    report.compare(f"p50, {large[0]}, against {small[0]}", large, small, "at most", 1.2)
    if len(sizes) > 2:
        few, many = (_case(*sizes[1]), OURS, "p50_ms"), (_case(*sizes[3]), OURS, "p50_ms")
        report.compare(f"p50, {many[0]}, against {few[0]}", many, few, "at most", 1.2)
    report.charts.append(Chart("Resuming, p50 in milliseconds", "p50_ms"))


def _case(events: int, partitions: int) -> str:
    return f"{events:,} events, {partitions} partitions"


def fill(dsn: str, events: int, partitions: int) -> None:
    """Past partitions, and events in all of them."""
    days = partitions - MADE
    with psycopg.connect(dsn, autocommit=True) as connection:
        # Nobody waits for these commits; those that are measured are other connections'.
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET timezone = 'UTC'")
        for (statement,) in connection.execute(PARTITION, (days,)).fetchall():
            connection.execute(statement)
        connection.execute(FILL, {"days": days, "events": events})
        connection.execute(STREAMS, (events // 100,))
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def resume(client: Client, cursor: str) -> float:
    """Milliseconds from the request to the end of the response."""
    start = time.perf_counter()
    stream = client.get(cursor)
    stream.finish()
    taken = (time.perf_counter() - start) * 1e3
    if (arrived := stream.data.count(b"notifications/progress")) != EVENTS:
        raise RuntimeError(f"{arrived} of {EVENTS} events arrived")
    return taken
