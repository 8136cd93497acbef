"""1, 2 and 4 workers on one database: calls that stream flat out on all of them, each read where it runs.

With as many processes as cores already, more workers cannot be faster: the question is what the database does for an
event, and that nothing falls over. Commits and WAL come from `pg_stat_database` and `pg_current_wal_insert_lsn`,
processor time from the operating system.
"""

from __future__ import annotations

import contextlib
import time

import psycopg

from tests.benchmarks.environment import Bench, Worker, workers
from tests.benchmarks.figures import OURS, Chart, Report, rotated
from tests.benchmarks.flatout import pour

TITLE = "Workers on one database"
CALLS = 20

DOING = """
    SELECT xact_commit, pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::float8
      FROM pg_stat_database WHERE datname = current_database()
"""


def run(bench: Bench, report: Report) -> None:
    counts = (1, 2) if bench.short else (1, 2, 4)
    events = 20 if bench.short else 200
    with bench.database() as dsn, contextlib.ExitStack() as stack:
        running = stack.enter_context(workers(OURS, dsn, counts[-1]))
        connection = stack.enter_context(psycopg.connect(dsn, autocommit=True))
        pour(running, 10, 10)
        for turn in range(bench.rounds):
            for count in rotated(counts, turn):
                figures = measure(bench, connection, running[:count], events)
                report.add(f"{count} worker{'s' * (count > 1)}", OURS, **figures)
    few, many = ((f"{count} worker{'s' * (count > 1)}", OURS, "rate_per_s") for count in (1, counts[-1]))
    report.compare(f"rate, {many[0]} against {few[0]}", many, few, "at least", 1)
    report.charts.append(Chart("Events per second", "rate_per_s"))


def measure(bench: Bench, connection: psycopg.Connection, used: list[Worker], events: int) -> dict[str, float]:
    """The total rate, and what database and workers did for one event."""
    commits, wal, database, worker = doing(bench, connection, used)
    rate = pour(used, CALLS, events)
    # Backends report what they did after a second at most.
    time.sleep(1.2)
    after = doing(bench, connection, used)
    total = CALLS * events * len(used)
    return {
        "rate_per_s": rate,
        "worker_cpu_us": (after[3] - worker) / total * 1e6,
        "database_cpu_us": (after[2] - database) / total * 1e6,
        "commits_per_event": (after[0] - commits) / total,
        "WAL_bytes_per_event": (after[1] - wal) / total,
    }


def doing(bench: Bench, connection: psycopg.Connection, used: list[Worker]) -> tuple[float, float, float, float]:
    """Commits, bytes of WAL, and seconds of processor time of database and workers so far."""
    row = connection.execute(DOING).fetchone()
    assert row is not None
    return row[0], row[1], bench.database_cpu(), sum(worker.cpu() for worker in used)
