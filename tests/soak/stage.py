"""PostgreSQL, the workers, haproxy, and what clients and faults share."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tests.support.following import Following
from tests.support.haproxy import RoundRobin, round_robin
from tests.support.servers import Server, migrated_cluster
from tests.support.workers import Worker, Workers, run_workers

DRAIN_TIMEOUT = 5.0
UNRESPONSIVE_TIMEOUT = 15.0
OUTAGE_TIMEOUT = 30.0
SILENCE = 6.0
"""After how long (seconds) without a byte a client takes its connection for dead; workers send some every two."""

OPTIONS = {
    "app": {"retry_interval": 100},
    "durable": {
        "drain_timeout": DRAIN_TIMEOUT,
        "unresponsive_timeout": UNRESPONSIVE_TIMEOUT,
        "outage_timeout": OUTAGE_TIMEOUT,
        "keep_alive": 2.0,
    },
}


def now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class Call:
    """One call of one client, and how it ended."""

    client: str
    operation: str
    request_id: str
    began: datetime
    outcome: str = ""
    seconds: float = 0.0
    following: Following | None = None
    final: Any = None


@dataclass(slots=True)
class Fault:
    """Something that was done, when, and to which process."""

    kind: str
    began: datetime
    pid: int | None = None
    ended: datetime | None = None
    note: str = ""


@dataclass(slots=True)
class Stage:
    """What runs; `over` is set when clients and faults are to come to an end."""

    server: Server
    workers: Workers
    proxy: RoundRobin
    ports: list[int]
    current: dict[int, Worker]
    """By port: who serves there, or is about to."""
    over: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[Call] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    attached: set[Following] = field(default_factory=set)
    """The streams that clients follow right now."""
    violations: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failed_starts: set[int] = field(default_factory=set)
    """Processes that could not start, since PostgreSQL was away."""
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def url(self, rng: random.Random) -> str:
        """Where a request goes: a worker, as a balancer that knows nothing would choose it, or haproxy."""
        if rng.random() < 0.25:
            return self.proxy.url
        return f"http://127.0.0.1:{rng.choice(self.ports)}"

    def violation(self, what: str) -> None:
        """A promise was broken."""
        self.violations.append(what)
        print(f"{now():%H:%M:%S} BROKEN: {what}", flush=True)

    def count(self, what: str, by: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + by

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something on the side; `settled` waits for it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settled(self) -> None:
        while self._tasks:
            await asyncio.gather(*self._tasks)

    async def until_closed(self, port: int) -> None:
        """Return when nobody listens on a port any more: uvicorn needs a moment for that after SIGTERM."""
        with contextlib.suppress(OSError):
            while True:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                await asyncio.sleep(0.02)

    async def start_again(self, port: int) -> None:
        """Put a new worker on a port. Where PostgreSQL is away it cannot start, and is started until it can."""
        while True:
            try:
                self.current[port] = await self.workers.add(port=port)
                return
            except AssertionError:
                failed = next(worker for worker in reversed(self.workers.members) if worker.port == port)
                self.failed_starts.add(failed.pid)
                self.count("starts that failed")
                if failed.running:
                    await failed.kill()


@contextlib.asynccontextmanager
async def stage(workers: int) -> AsyncIterator[Stage]:
    """Run everything until the block ends."""
    cluster_context = migrated_cluster()
    # It runs a loop of its own.
    cluster = await asyncio.to_thread(cluster_context.__enter__)
    try:
        async with (
            Server.copy_of(cluster, max_connections=200) as server,
            run_workers("tests.soak.server", server.dsn, workers, options=OPTIONS) as running,
            round_robin(running.urls) as proxy,
        ):
            current = {worker.port: worker for worker in running.members}
            yield Stage(server, running, proxy, list(current), current)
    finally:
        await asyncio.to_thread(cluster_context.__exit__, None, None, None)
