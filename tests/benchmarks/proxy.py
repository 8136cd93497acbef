"""Short tool calls through a proxy over HTTP, and past it: the same upstream, one uvicorn worker each, driven by wrk.

The upstream is the SDK without an event store, which gives its events no ids. Proxy and upstream share the two cores
with PostgreSQL and wrk, so that the upstream alone has more of them than it has behind a proxy.
"""

from __future__ import annotations

import contextlib

from tests.benchmarks.calls import case, find_wrk, measure
from tests.benchmarks.environment import Bench, workers
from tests.benchmarks.figures import BARE, PERSIST_PROXY, PROXY, Report

TITLE = "Short tool calls through a proxy"
PROXIES = (PROXY, PERSIST_PROXY)


def run(bench: Bench, report: Report) -> None:
    if (wrk := find_wrk(report)) is None:
        return
    with bench.database() as dsn, contextlib.ExitStack() as stack:
        [upstream] = stack.enter_context(workers(BARE, dsn))
        running = {subject: stack.enter_context(workers(subject, dsn, upstream=upstream.url))[0] for subject in PROXIES}
        counts = measure(bench, report, wrk, running | {BARE: upstream})
    for count in counts:
        ours = (case(count), PROXY, "rate_per_s")
        against = (case(count), PERSIST_PROXY, "rate_per_s")
        report.compare(f"rate, {case(count)}, against {PERSIST_PROXY}", ours, against, "at least", 1.5)
    report.notes.append("The upstream alone is for comparison; it has no target.")
