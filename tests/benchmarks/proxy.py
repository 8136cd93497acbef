"""Short tool calls through a proxy over HTTP, and past it: one process each, driven by wrk.

There are two upstreams, which differ in how much of the machine they take themselves: `server-everything` of the
TypeScript SDK, in Node, which gives its events ids, and the SDK for Python without an event store, which gives none.
Proxy and upstream share the two cores with PostgreSQL and wrk, so that an upstream alone has more of them than it has
behind a proxy.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.calls import find_wrk, measure
from tests.benchmarks.environment import Bench, Worker, stop, wait_ready, workers
from tests.benchmarks.figures import BARE, PERSIST_PROXY, PROXY, Chart, Report
from tests.support.node import install_everything
from tests.support.postgres import free_port

TITLE = "Short tool calls through a proxy"
PROXIES = (PROXY, PERSIST_PROXY)
ALONE = "the upstream alone"
EVERYTHING = "server-everything"


def run(bench: Bench, report: Report) -> None:
    if (wrk := find_wrk(report)) is None:
        return
    upstreams = {BARE: (", SDK for Python", "text")}
    if shutil.which("npm") is None:
        report.notes.append(f"Before {EVERYTHING} nothing was measured: npm is not installed.")
    else:
        upstreams = {EVERYTHING: (f", {EVERYTHING}", "message"), **upstreams}
    for kind, (note, argument) in upstreams.items():
        with bench.database() as dsn, contextlib.ExitStack() as stack:
            upstream = stack.enter_context(_everything() if kind == EVERYTHING else _sdk(dsn))
            running = {proxy: stack.enter_context(workers(proxy, dsn, upstream=upstream.url))[0] for proxy in PROXIES}
            cases = measure(bench, report, wrk, running | {ALONE: upstream}, note=note, argument=argument)
        for case in cases:
            ours, theirs = ((case, subject, "rate_per_s") for subject in PROXIES)
            report.compare(f"rate, {case}, against {PERSIST_PROXY}", ours, theirs, "at least", 1.5)
    report.notes.append("The upstreams alone are for comparison; they have no target.")
    report.charts.append(Chart("Tool calls per second", "rate_per_s"))


@contextlib.contextmanager
def _sdk(dsn: str) -> Iterator[Worker]:
    with workers(BARE, dsn) as [upstream]:
        yield upstream


@contextlib.contextmanager
def _everything() -> Iterator[Worker]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="upstream-") as made:
        log = Path(made) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*install_everything(), "streamableHttp"],
                env=os.environ | {"PORT": str(port)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        upstream = Worker(EVERYTHING, f"http://127.0.0.1:{port}", process, log)
        try:
            wait_ready(upstream)
            yield upstream
        finally:
            stop(upstream)
