"""Worker processes of a test server, each a `python -m uvicorn` on a port of its own.

A worker that has started accepts connections, because uvicorn listens once the app's lifespan has started. Its output
goes to a file; `assert_clean_logs` reads it. Processes are ended by the id of the process that was started here, and
Linux ends them when the test run itself is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.postgres import PASSWORD, die_with_parent, free_port

ROOT = Path(__file__).parents[2]
SUSPICIOUS = re.compile(r"Traceback|\bERROR\b|\bWARNING\b|\bCRITICAL\b|Exception|Warning:|never retrieved")


@dataclass(slots=True)
class Worker:
    """One process that serves the app; `stop` and `kill` end it, `pause` freezes it."""

    port: int
    process: asyncio.subprocess.Process
    log: Path
    skip: int = 0
    """How many characters of the output belong to earlier tests."""
    host: str = "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def output(self) -> str:
        """What the process has written to stdout and stderr since this test began."""
        return self.log.read_text(errors="replace")[self.skip :]

    def signal(self, signum: int) -> None:
        if self.running:
            self.process.send_signal(signum)

    def pause(self) -> None:
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.signal(signal.SIGCONT)

    async def wait_ready(self, timeout: float = 30.0) -> None:
        """Return when the worker accepts connections."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                _, writer = await asyncio.open_connection(self.host, self.port)
            except OSError:
                if not self.running or time.monotonic() > deadline:
                    raise AssertionError(f"The worker on port {self.port} did not start:\n{self.output()}") from None
                await asyncio.sleep(0.05)
            else:
                writer.close()
                await writer.wait_closed()
                return

    async def stop(self, timeout: float = 15.0) -> int:
        """End the process with SIGTERM, then SIGKILL when it has not gone after `timeout`; its exit code."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(timeout):
                return await self.process.wait()
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        """End the process with SIGKILL; its exit code."""
        self.signal(signal.SIGKILL)
        return await self.process.wait()


@dataclass(slots=True)
class Workers:
    """Some processes of one app on one database. `workers[0].url`, `workers.urls`, `workers.release("key")`."""

    module: str
    directory: Path
    environment: Mapping[str, str]
    members: list[Worker] = field(default_factory=list)

    def __getitem__(self, index: int) -> Worker:
        return self.members[index]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def urls(self) -> list[str]:
        """The base URLs of the processes that run."""
        return [worker.url for worker in self.members if worker.running]

    async def add(
        self,
        *,
        port: int | None = None,
        host: str = "127.0.0.1",
        inside: Sequence[str] = (),
        root: Path = ROOT,
        **environment: str,
    ) -> Worker:
        """Start one more process, and wait until it serves; `inside` are the words of a command that runs another.

        `root` is the checkout whose code it runs.
        """
        worker = await self._spawn(port or free_port(), environment, host, inside, root)
        await worker.wait_ready()
        return worker

    async def _spawn(
        self,
        port: int,
        environment: Mapping[str, str],
        host: str = "127.0.0.1",
        inside: Sequence[str] = (),
        root: Path = ROOT,
    ) -> Worker:
        log = self.directory / f"worker-{len(self.members)}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(*inside, sys.executable, "-m", "uvicorn", f"{self.module}:app"),
                *("--host", host, "--port", str(port)),
                *("--log-level", "warning", "--timeout-graceful-shutdown", "5"),
                cwd=root,
                env={**os.environ, **self.environment, "PYTHONPATH": str(root), **environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
        worker = Worker(port, process, log, host=host)
        self.members.append(worker)
        return worker

    async def start(self, count: int) -> None:
        """Start `count` processes at once, and wait until all serve."""
        started = [await self._spawn(free_port(), {}) for _ in range(count)]
        for worker in started:
            await worker.wait_ready()

    def forget(self) -> None:
        """Begin anew for the next test: no keys of `wait`, no output."""
        for key in self.directory.iterdir():
            if key.suffix != ".log":
                key.unlink()
        for worker in self.members:
            worker.skip += len(worker.output())

    def show(self) -> None:
        """Print what the processes wrote; pytest shows it for a test that failed."""
        for number, worker in enumerate(self.members):
            if output := worker.output():
                print(f"--- worker {number}, pid {worker.pid}, exit code {worker.process.returncode}")
                print(output[-8000:])

    def release(self, key: str) -> None:
        """Let the tool call `wait(key)` go on."""
        (self.directory / key).touch()

    async def wait_for(self, key: str, timeout: float = 10.0) -> None:
        """Return when a tool call `wait(key)` has begun to wait."""
        async with asyncio.timeout(timeout):
            while not (self.directory / f"{key}.waiting").exists():  # noqa: ASYNC110 (made by another process)
                await asyncio.sleep(0.01)

    def assert_clean_logs(self, *allowed: str) -> None:
        """Fail on a warning, an error or a traceback in any output, and on the database's password.

        `allowed` are regular expressions; a line that contains one of them passes.
        """
        for worker in self.members:
            output = worker.output()
            assert PASSWORD not in output, f"Worker {worker.port} wrote the database's password:\n{output[-4000:]}"
            for line in output.splitlines():
                if SUSPICIOUS.search(line) and not any(re.search(pattern, line) for pattern in allowed):
                    raise AssertionError(f"Worker {worker.port} wrote {line!r}:\n{output[-4000:]}")

    async def stop(self) -> None:
        """End every process that still runs."""
        await asyncio.gather(*(worker.stop() for worker in self.members if worker.running))


@contextlib.asynccontextmanager
async def run_workers(
    module: str,
    dsn: str | None,
    count: int = 2,
    *,
    options: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Workers]:
    """Run `count` processes of `tests.servers.<module>` (or of a module with its packages) until the block ends.

    `options` is what `tests/servers/common.py` reads from TEST_OPTIONS. Without a `dsn` the app is left undurable.
    """
    with tempfile.TemporaryDirectory(prefix="workers-") as made:
        variables = {
            "PYTHONWARNINGS": "default",
            "COLUMNS": "500",  # the SDK logs with rich, which would break lines in the middle of a word
            "TEST_DIRECTORY": made,
            "TEST_OPTIONS": json.dumps(options or {}),
            **({"TEST_DURABLE": "0"} if dsn is None else {"MCP_PG_EVENTS_DSN": dsn}),
            **(environment or {}),
        }
        workers = Workers(module if "." in module else f"tests.servers.{module}", Path(made), variables)
        try:
            await workers.start(count)
            yield workers
        finally:
            await workers.stop()
            workers.show()
