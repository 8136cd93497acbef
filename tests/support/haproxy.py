"""haproxy in front of some workers: every request goes to the next one, whatever session or connection it belongs to.

    async with round_robin(workers.urls) as proxy:
        proxy.url               # connect here; each response names its server in `x-worker`: "0", "1", ...
        await proxy.served()    # how many requests each has got

No connection to a worker is used twice. A request that a worker refuses, or hangs up on without a word, is tried on the
next: at SIGTERM uvicorn closes its socket with the connections that wait in it, and those whose request it has not
read. That is safe, since a request that did arrive is in flight, and refused when it comes again. Responses are passed
on as they come.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import signal
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.postgres import die_with_parent, free_port
from tests.support.tools import require_tool

_CONFIGURATION = """
global
    stats socket {directory}/stats.sock
defaults
    mode http
    balance roundrobin
    http-reuse never
    option http-no-delay
    option redispatch 1
    retries 3
    option http-buffer-request
    retry-on conn-failure empty-response
    timeout connect 5s
    timeout client 5m
    timeout server 5m
listen workers
    bind 127.0.0.1:{port}
    http-response set-header x-worker %s
{servers}
"""


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """A running haproxy."""

    port: int
    directory: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def served(self) -> list[int]:
        """How many requests each worker has been given since the start."""
        reader, writer = await asyncio.open_unix_connection(self.directory / "stats.sock")
        writer.write(b"show stat\n")
        table = (await reader.read()).decode().removeprefix("# ").splitlines()
        writer.close()
        rows = [row for row in csv.DictReader(table) if row["svname"].isdigit()]
        return [int(row["stot"]) for row in sorted(rows, key=lambda row: int(row["svname"]))]


@contextlib.asynccontextmanager
async def round_robin(urls: Sequence[str]) -> AsyncIterator[RoundRobin]:
    """Run haproxy in front of the workers at `urls` until the block ends; skips the test where there is none."""
    servers = "\n".join(f"    server {number} {urlsplit(url).netloc}" for number, url in enumerate(urls))
    with tempfile.TemporaryDirectory(prefix="haproxy-") as made:
        proxy = RoundRobin(free_port(), Path(made))
        configuration = _CONFIGURATION.format(directory=made, port=proxy.port, servers=servers)
        async with configured(configuration, proxy.port, proxy.directory):
            yield proxy


@contextlib.asynccontextmanager
async def configured(configuration: str, port: int, directory: Path) -> AsyncIterator[None]:
    """Run haproxy as `configuration` says, which has it listen on `port`, until the block ends."""
    haproxy = require_tool("haproxy", "run `apt-get install haproxy`.")
    file = directory / "haproxy.cfg"
    file.write_text(configuration)
    process = await asyncio.create_subprocess_exec(
        *(haproxy, "-db", "-q", "-f", str(file)),
        stdin=asyncio.subprocess.DEVNULL,
        preexec_fn=die_with_parent(signal.SIGTERM),
    )
    try:
        await _wait_until_it_listens(process, port)
        yield
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _wait_until_it_listens(process: asyncio.subprocess.Process, port: int) -> None:
    while process.returncode is None:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"haproxy ended at once with exit code {process.returncode}")
