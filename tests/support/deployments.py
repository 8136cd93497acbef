"""The test server as people run it: by uvicorn, by uvicorn with several workers, by `serve`, by gunicorn, in a thread.

    async with deployed("gunicorn", dsn, drain_timeout=3) as deployment:
        deployment.url                              # any of its workers
        await deployment.workers()                  # process ids
        assert await deployment.ended_by(signal.SIGTERM, within=10) == 0

`tests/support/workers.py` runs one process a port, for everything where it does not matter who runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from tests.support.postgres import PASSWORD, die_with_parent, free_port
from tests.support.tools import missing_tool
from tests.support.until import until
from tests.support.workers import ROOT, SUSPICIOUS

_APP = "tests.servers.mcpserver_app:app"
_COMMANDS = {
    "uvicorn": ("uvicorn", _APP, "--port", "{port}", "--log-level", "warning"),
    "uvicorn --workers": ("uvicorn", _APP, "--port", "{port}", "--workers", "2"),
    "serve --workers": ("mcp_pg_events", "serve", _APP, "--port", "{port}", "--workers", "2"),
    "gunicorn": ("gunicorn", _APP, "-k", "uvicorn_worker.UvicornWorker", "-w", "2", "-b", "127.0.0.1:{port}"),
    "thread": ("tests.servers.threaded", "{port}"),
}
SERVERS = list(_COMMANDS)


@dataclass(slots=True)
class Deployment:
    """The process that was started, and those that it starts."""

    dsn: str
    port: int
    process: asyncio.subprocess.Process
    directory: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def output(self) -> str:
        """What all its processes wrote."""
        return (self.directory / "log").read_text(errors="replace")

    async def workers(self) -> list[int]:
        """The processes that serve, by what the database knows of living workers."""
        mine = {self.process.pid, *await _children(self.process.pid)}
        rows = await rows_of(self.dsn, "SELECT pid FROM mcp_events.workers WHERE ended_at IS NULL ORDER BY number")
        return [pid for (pid,) in rows if pid in mine]

    async def until_it_serves(self, count: int) -> list[int]:
        """Return the ids of its `count` workers when they have started."""

        async def ready() -> bool:
            assert self.process.returncode is None, f"It ended:\n{self.output()}"
            return len(await self.workers()) == count

        await until(ready, 40)
        # A worker is registered before it accepts: the port says that one does, and nobody is sent to another by name.
        await until(self._accepts, 10)
        return await self.workers()

    async def _accepts(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True

    def release(self, key: str) -> None:
        """Let the tool call `wait(key)` go on."""
        (self.directory / key).touch()

    async def ended_by(self, signum: int, within: float) -> int:
        """Send a signal to the process that was started, and wait for its end: the exit code."""
        self.process.send_signal(signum)
        async with asyncio.timeout(within):
            return await self.process.wait()

    def assert_clean_logs(self, *allowed: str) -> None:
        """As `Workers.assert_clean_logs`."""
        output = self.output()
        assert PASSWORD not in output
        for line in output.splitlines():
            if SUSPICIOUS.search(line) and not any(re.search(pattern, line) for pattern in allowed):
                raise AssertionError(f"It wrote {line!r}:\n{output[-4000:]}")


@contextlib.asynccontextmanager
async def deployed(server: str, dsn: str, **durable: Any) -> AsyncIterator[Deployment]:
    """Run the test server by one of `SERVERS` until the block ends; `durable` are options of `durable`."""
    if server == "gunicorn" and not all(map(importlib.util.find_spec, ("gunicorn", "uvicorn_worker"))):
        missing_tool("gunicorn", "run `pip install gunicorn uvicorn-worker`.")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="deployment-") as made:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            # uvicorn's supervisor leaves the socket that it listens on to the end of its process.
            "PYTHONWARNINGS": "default,ignore:unclosed:ResourceWarning",
            "COLUMNS": "160",
            "MCP_PG_EVENTS_DSN": dsn,
            "TEST_DIRECTORY": made,
            "TEST_OPTIONS": json.dumps({"durable": durable}),
        }
        with (Path(made) / "log").open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", *(word.format(port=port) for word in _COMMANDS[server])),
                cwd=ROOT,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=die_with_parent(signal.SIGTERM),
            )
        deployment = Deployment(dsn, port, process, Path(made))
        try:
            yield deployment
        finally:
            if process.returncode is None:
                left = await _children(process.pid)
                process.kill()
                await process.wait()
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            print(deployment.output()[-8000:])


async def rows_of(dsn: str, query: str, *parameters: object) -> list[tuple[Any, ...]]:
    """The rows of one statement, on a connection of its own."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        return await (await connection.execute(query.encode(), parameters or None)).fetchall()


async def _children(pid: int) -> list[int]:
    """The processes that a process started, as `ps` knows them."""
    listing = await asyncio.create_subprocess_exec("ps", "-A", "-o", "pid=,ppid=", stdout=asyncio.subprocess.PIPE)
    listed, _ = await listing.communicate()
    pairs = (line.split() for line in listed.decode().splitlines())
    return [int(child) for child, parent in pairs if int(parent) == pid]


def runs(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
