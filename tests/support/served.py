"""`mcp-pg-events serve` and `proxy` as processes of their own, which say where they serve."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support.command import without_settings

PATIENCE = 90
"""Seconds; a busy machine is no failure, and whoever waits notices when a process has ended."""

UNREACHABLE = "postgresql://u:secret@127.0.0.1:1/x"


class Served:
    """A running command, and the file that all its output goes to."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log

    @classmethod
    def start(cls, log: Path, *arguments: str, directory: Path | None = None, **environment: str) -> Served:
        """`mcp-pg-events ARGUMENTS...` in a process of its own."""
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "mcp_pg_events", *arguments],
                cwd=directory,
                env=without_settings(**environment),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return cls(process, log)

    def url(self) -> str:
        """Where its endpoint is, once it serves."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"Serving \S+ with .* at (http\S+)", self.log.read_text()):
                host, port = re.findall(r"//(.*):(\d+)/", found[1])[0]
                try:
                    socket.create_connection((host, int(port)), timeout=1).close()
                    return found[1]
                except OSError:
                    pass
            time.sleep(0.05)
        raise AssertionError(f"it does not serve:\n{self.log.read_text()}")

    def replacement_of(self, workers: list[int]) -> int:
        """The process that came for one of `workers`."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            if new := set(self.workers()) - set(workers):
                return new.pop()
            time.sleep(0.05)
        raise AssertionError(f"no worker came:\n{self.log.read_text()}")

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        # multiprocessing's resource tracker is a child too
        return [int(pid) for pid in children if "spawn_main" in _command_line(pid)]


def _command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:  # it has just ended
        return ""


async def url_of(proxied: Served) -> str:
    """Where a proxy serves, without the endpoint's path."""
    return (await asyncio.to_thread(proxied.url)).rpartition("/")[0]
