"""Short tool calls over HTTP: one uvicorn worker, `echo`, 1, 16 and 64 connections kept alive, driven by wrk.

Each connection's worth of load has a session of its own. The SDK without an event store and with one in memory say what
durability costs; they lose everything with their process.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

from tests.benchmarks.environment import Bench, Worker, workers
from tests.benchmarks.figures import BARE, MEMORY, OURS, PERSIST, PERSIST_SQLITE, Chart, Report, rotated
from tests.benchmarks.wire import VERSION, Client, path_of

TITLE = "Short tool calls over HTTP"
SUBJECTS = (OURS, PERSIST, MEMORY, BARE)
SCRIPT = Path(__file__).with_name("calls.lua")


def run(bench: Bench, report: Report) -> None:
    if (wrk := find_wrk(report)) is None:
        return
    subjects = [*SUBJECTS]
    if importlib.util.find_spec("aiosqlite") is not None:
        subjects.append(PERSIST_SQLITE)
    with bench.database() as dsn, contextlib.ExitStack() as stack:
        running = {subject: stack.enter_context(workers(subject, dsn))[0] for subject in subjects}
        measure(bench, report, wrk, running)
    ours = (case(16), OURS, "rate_per_s")
    for other, target in ((MEMORY, 0.95), (PERSIST, 1.7)):
        report.compare(f"rate, {case(16)}, against {other}", ours, (case(16), other, "rate_per_s"), "at least", target)
    report.charts.append(Chart("Tool calls per second", "rate_per_s"))


def find_wrk(report: Report) -> str | None:
    """The program; without it the report says that nothing was measured."""
    if (wrk := shutil.which("wrk")) is None:
        report.notes.append("Not measured: wrk is not installed (`apt-get install wrk`, `brew install wrk`).")
    return wrk


def measure(
    bench: Bench, report: Report, wrk: str, running: dict[str, Worker], *, note: str = "", argument: str = "text"
) -> list[str]:
    """Report how fast each worker is for each number of connections, and return those cases, which `note` ends.
    `argument` is what the tool `echo` calls its argument."""
    seconds = 1 if bench.short else 3
    counts = (16,) if bench.short else (1, 16, 64)
    for worker in running.values():
        drive(wrk, worker, 4, 1, argument)
    for turn in range(bench.rounds):
        for count in counts:
            for subject in rotated([*running], turn):
                figures = drive(wrk, running[subject], count, seconds, argument)
                report.add(case(count, note), subject, **figures)
    return [case(count, note) for count in counts]


def case(count: int, note: str = "") -> str:
    return f"{count} connection{'s' * (count > 1)}{note}"


def drive(wrk: str, worker: Worker, connections: int, seconds: int, argument: str = "text") -> dict[str, float]:
    """Calls per second, their latency, and the server's processor time for one, after a look at one answer."""
    clients = [Client(worker.url, worker.subject) for _ in range(connections)]
    answer = clients[0].call("echo", **{argument: "hello"}).finish()
    if b'hello"' not in answer:
        raise RuntimeError(f"{worker.subject} answered {answer!r}")
    path = path_of(worker.subject)
    before = worker.cpu()
    ended = subprocess.run(
        [
            *(wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(SCRIPT), worker.url),
            *("--", path, VERSION, argument, *(client.session_id for client in clients)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    used = worker.cpu() - before
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    if found["errors"]:
        raise RuntimeError(f"{found['errors']} calls of {worker.subject} failed:\n{ended.stdout}")
    return {
        "rate_per_s": found["calls"] / found["microseconds"] * 1e6,
        "p50_ms": found["p50"] / 1e3,
        "p99_ms": found["p99"] / 1e3,
        "server_cpu_ms": used / found["calls"] * 1e3,
    }
