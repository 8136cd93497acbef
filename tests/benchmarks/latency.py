"""From an event's emission to the client's socket: on the worker that runs the call, and on the other one.

The tool puts the clock into the event (CLOCK_MONOTONIC, which all processes of a machine share), the client looks at
the clock when `recv` returns. The yardstick is a one-row commit of the same size at the same pace, on one connection.
"""

from __future__ import annotations

import time
from contextlib import closing

import psycopg

from tests.benchmarks.environment import Bench, Worker, workers
from tests.benchmarks.figures import OURS, Chart, Report, percentile, rotated
from tests.benchmarks.wire import Client, Stream, read_all, start_calls

TITLE = "Emission to the client's socket"
PAUSE = 0.005
COMMIT, SAME, OTHER = "one-row commit", f"{OURS}, same worker", f"{OURS}, other worker"


def run(bench: Bench, report: Report) -> None:
    counts = (1,) if bench.short else (1, 100, 1000)
    samples = 300 if bench.short else 800
    with bench.database() as dsn, workers(OURS, dsn, 2) as pair, psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE one_row (id bigint PRIMARY KEY, payload text NOT NULL)")
        for turn in range(bench.rounds):
            for subject in rotated((COMMIT, SAME, OTHER), turn):
                for count in counts:
                    if subject != COMMIT:
                        case = f"{count:,} attached stream{'s' * (count > 1)}"
                        _add(report, case, subject, emissions(pair, count, max(samples, 2 * count), subject == OTHER))
                    elif count == 1:
                        _add(report, "1 attached stream", COMMIT, commits(connection, samples, turn))
    first = "1 attached stream"
    commit = (first, COMMIT, "p50_ms")
    report.compare("same worker, p50 against a commit's", (first, SAME, "p50_ms"), commit, "at most", 3)
    report.compare("other worker, p50 against a commit's", (first, OTHER, "p50_ms"), commit, "at most", 5)
    report.bound("other worker, p50", (first, OTHER, "p50_ms"), "at most", 2, "ms")
    report.bound("other worker, p99", (first, OTHER, "p99_ms"), "at most", 10, "ms")
    if 1000 in counts:
        label = "other worker, 1,000 streams, p99"
        report.bound(label, ("1,000 attached streams", OTHER, "p99_ms"), "at most", 25, "ms")
    report.charts.append(Chart("Emission to the client's socket, p50", "p50_ms"))


def _add(report: Report, case: str, subject: str, taken: list[float]) -> None:
    report.add(case, subject, p50_ms=percentile(taken, 0.5), p99_ms=percentile(taken, 0.99))


def commits(connection: psycopg.Connection, samples: int, turn: int) -> list[float]:
    """Milliseconds that each of some paced commits took."""
    taken = []
    payload = "x" * 250
    for number in range(samples):
        start = time.monotonic_ns()
        connection.execute("INSERT INTO one_row VALUES (%s, %s)", (turn * samples + number, payload))
        taken.append((time.monotonic_ns() - start) / 1e6)
        time.sleep(PAUSE)
    return taken[20:]


def emissions(pair: list[Worker], count: int, samples: int, other: bool) -> list[float]:
    """Milliseconds from emission to `recv`, with events spread evenly over all streams."""
    a, b = pair
    clients = [Client(a.url, OURS) for _ in range(-(-count // 50))]
    with closing(clients[0].call("ready")) as call:
        call.finish()
    arguments = [
        {"n": samples // count, "pause": PAUSE * count, "offset": 0.1 + PAUSE * place} for place in range(count)
    ]
    streams = start_calls(clients, "emit", arguments, b.url if other else None)
    clients[0].call("go").finish()
    taken: list[float] = []

    def arrived(stream: Stream, now: int) -> None:
        taken.extend((now - moment) / 1e6 for moment in stream.moments())

    read_all(streams, arrived)
    if len(taken) != (samples // count) * count:
        raise RuntimeError(f"{len(taken)} of {samples} events arrived")
    return taken[20:]
