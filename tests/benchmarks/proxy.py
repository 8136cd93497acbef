"""Short tool calls through a proxy over HTTP, and past it: the same upstream, one uvicorn worker each, driven by wrk.

The upstream is the SDK without an event store, which gives its events no ids. Proxy and upstream share the two cores
with PostgreSQL and wrk, so that the upstream alone has more of them than it has behind a proxy.
"""

from __future__ import annotations

import contextlib
import shutil

from tests.benchmarks.calls import case, drive
from tests.benchmarks.environment import Bench, workers
from tests.benchmarks.figures import BARE, PERSIST_PROXY, PROXY, Chart, Report, rotated

TITLE = "Short tool calls through a proxy"
SUBJECTS = (PROXY, PERSIST_PROXY, BARE)


def run(bench: Bench, report: Report) -> None:
    if (wrk := shutil.which("wrk")) is None:
        report.notes.append("Not measured: wrk is not installed (`apt-get install wrk`, `brew install wrk`).")
        return
    seconds = 1 if bench.short else 3
    counts = (16,) if bench.short else (1, 16, 64)
    with bench.database() as dsn, contextlib.ExitStack() as stack:
        [upstream] = stack.enter_context(workers(BARE, dsn))
        running = {BARE: upstream}
        for subject in (PROXY, PERSIST_PROXY):
            [running[subject]] = stack.enter_context(workers(subject, dsn, upstream=upstream.url))
        for worker in running.values():
            drive(wrk, worker, 4, 1)
        for turn in range(bench.rounds):
            for count in counts:
                for subject in rotated(SUBJECTS, turn):
                    report.add(case(count), subject, **drive(wrk, running[subject], count, seconds))
    for count in counts:
        ours = (case(count), PROXY, "rate_per_s")
        against = (case(count), PERSIST_PROXY, "rate_per_s")
        report.compare(f"rate, {case(count)}, against {PERSIST_PROXY}", ours, against, "at least", 1.5)
    report.notes.append("The upstream alone is for comparison; it has no target.")
    report.charts.append(Chart("Tool calls per second", "rate_per_s"))
