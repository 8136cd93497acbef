"""What goes wrong: every few seconds something, chosen by chance."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Awaitable, Callable

from tests.soak.stage import DRAIN_TIMEOUT, OUTAGE_TIMEOUT, UNRESPONSIVE_TIMEOUT, Fault, Stage, now
from tests.support.servers import ROLE, Mode

INTERVAL = (2.0, 6.0)
"""Seconds between two faults."""


class Faults:
    """Does one after the other; a worker, or PostgreSQL, that something is being done to is left alone meanwhile."""

    def __init__(self, stage: Stage, rng: random.Random) -> None:
        self._stage = stage
        self._rng = rng
        self._busy: set[int] = set()
        self._database_busy = False
        self._running: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the stage is over; then until all that was begun has come to its end."""
        kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (5, self._kill),
            (5, self._terminate),
            (4, lambda: self._freeze("SIGSTOP, briefly", self._rng.uniform(0.5, 6.0))),
            (1, lambda: self._freeze("SIGSTOP, for too long", UNRESPONSIVE_TIMEOUT + self._rng.uniform(4.0, 8.0))),
            (4, self._end_backends),
            (2, lambda: self._restart("fast", self._rng.uniform(0.0, 3.0))),
            (2, lambda: self._restart("immediate", self._rng.uniform(0.0, 3.0))),
            (4, self._cut_all),
        ]
        weights = [weight for weight, _ in kinds]
        while not self._stage.over.is_set():
            [(_, fault)] = self._rng.choices(kinds, weights)
            task = asyncio.ensure_future(fault())
            self._running.add(task)
            task.add_done_callback(self._done)
            try:
                async with asyncio.timeout(self._rng.uniform(*INTERVAL)):
                    await self._stage.over.wait()
            except TimeoutError:
                pass
        await asyncio.gather(*self._running)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._stage.violation(f"a fault could not be done: {error!r}")

    async def outage(self) -> None:
        """PostgreSQL is away for longer than anybody waits."""
        await self._restart("fast", OUTAGE_TIMEOUT + 5.0, "PostgreSQL away for longer than outage_timeout")

    def _note(self, kind: str, pid: int | None = None) -> Fault:
        fault = Fault(kind, now(), pid)
        self._stage.faults.append(fault)
        return fault

    def _victim(self) -> int | None:
        """The port of a worker that nothing happens to, if more than one is left: somebody has to be there."""
        free = [port for port in self._stage.ports if port not in self._busy]
        return self._rng.choice(free) if len(free) > 1 else None

    async def _kill(self) -> None:
        if (port := self._victim()) is None:
            return
        self._busy.add(port)
        worker = self._stage.current[port]
        fault = self._note("SIGKILL", worker.pid)
        await worker.kill()
        await self._stage.start_again(port)
        fault.ended = now()
        self._busy.discard(port)

    async def _terminate(self) -> None:
        if (port := self._victim()) is None:
            return
        self._busy.add(port)
        worker = self._stage.current[port]
        fault = self._note("SIGTERM", worker.pid)
        worker.signal(signal.SIGTERM)
        await self._stage.until_closed(port)
        starting = asyncio.create_task(self._stage.start_again(port))
        try:
            # It may have to wait for PostgreSQL, too.
            async with asyncio.timeout(DRAIN_TIMEOUT + OUTAGE_TIMEOUT + 15):
                code = await worker.process.wait()
        except TimeoutError:
            self._stage.violation(f"worker {worker.pid} does not end after SIGTERM")
            code = await worker.kill()
        fault.ended = now()
        if code != -signal.SIGTERM:
            self._stage.violation(f"worker {worker.pid} ended with {code} after SIGTERM")
        await starting
        self._busy.discard(port)

    async def _freeze(self, kind: str, seconds: float) -> None:
        if (port := self._victim()) is None:
            return
        self._busy.add(port)
        worker = self._stage.current[port]
        fault = self._note(kind, worker.pid)
        worker.pause()
        await asyncio.sleep(seconds)
        worker.resume()
        fault.ended = now()
        self._busy.discard(port)

    async def _end_backends(self) -> None:
        if self._database_busy:
            return
        share = self._rng.choice((0.1, 0.5, 1.0))
        fault = self._note("pg_terminate_backend")
        ended = await self._stage.server.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{ROLE}' AND random() < %s", share
        )
        fault.note = str(len(ended))

    async def _restart(self, mode: Mode, away: float, kind: str | None = None) -> None:
        if self._database_busy:
            return
        self._database_busy = True
        fault = self._note(kind or f"PostgreSQL restarted ({mode})")
        await self._stage.server.stop(mode)
        await asyncio.sleep(away)
        await self._stage.server.start()
        fault.ended = now()
        self._database_busy = False

    async def _cut_all(self) -> None:
        self._note("all connections of clients cut")
        for following in list(self._stage.attached):
            if following.response is not None:
                following.response.cut()
