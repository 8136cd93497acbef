"""Start-up: importing the package, and from a worker's start until it accepts connections."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.benchmarks.environment import Bench, workers
from tests.benchmarks.figures import BARE, OURS, PERSIST, Chart, Report, rotated

TITLE = "Import and start-up"
IMPORTS = {BARE: "mcp.server.mcpserver", OURS: "mcp.server.mcpserver, mcp_pg_events"}
IMPORTS[PERSIST] = "mcp.server.mcpserver, mcp_persist"


def run(bench: Bench, report: Report) -> None:
    repetitions = 1 if bench.short else 5
    for turn in range(bench.rounds):
        for subject in rotated((OURS, PERSIST, BARE), turn):
            taken = min(imported(IMPORTS[subject]) for _ in range(repetitions))
            report.add("importing it with the SDK", subject, time_ms=taken)
    with bench.database() as dsn:
        for turn in range(bench.rounds):
            for subject in rotated((OURS, PERSIST, BARE), turn):
                start = time.perf_counter()
                with workers(subject, dsn):
                    taken = (time.perf_counter() - start) * 1e3
                report.add("a worker accepts connections", subject, time_ms=taken)
    report.charts.append(Chart("Start-up", "time_ms"))


def imported(modules: str) -> float:
    """Milliseconds that a new interpreter takes to import modules and end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    return (time.perf_counter() - start) * 1e3
