"""The demo from end to end: start the processes, cut the connection, count what arrives.

What counts is what the client's process says it received, one line per event: nothing here is repaired or filtered.
Next: `show` for the eye, `Verdict` for the exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any, TypeVar

from psycopg import AsyncConnection
from rich.console import Console
from rich.markup import escape

from ..errors import Error
from .forwarder import Cut, Forwarder, Routed
from .show import Screen, View
from .watch import Watcher

__all__ = ["Options", "Verdict", "run"]

_WORKERS = 2
_START_TIMEOUT = 20.0
_OVERTIME = 15.0
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """`seconds` is how long the call lasts, `seed` decides when it is cut."""

    events: int
    seconds: float
    cuts: int
    seed: int


@dataclass(slots=True, kw_only=True)
class Verdict:
    """What was counted."""

    expected: int
    received: list[int] = field(default_factory=list[int])
    result: str | None = None
    failed: bool = False
    cuts: int = 0
    half_open: int = 0
    resumed_elsewhere: int = 0
    resumed_here: int = 0
    worker_log: list[str] = field(default_factory=list[str])
    """What the workers last logged, if the demo did not pass."""

    @property
    def lost(self) -> int:
        return len(set(range(1, self.expected + 1)) - set(self.received))

    @property
    def doubled(self) -> int:
        return sum(times - 1 for times in Counter(self.received).values())

    @property
    def misplaced(self) -> int:
        return sum(after < before for before, after in zip(self.received, self.received[1:], strict=False))

    @property
    def passed(self) -> bool:
        """Every event once and in order, and the result after them."""
        finished = self.result is not None and not self.failed
        return finished and self.received == list(range(1, self.expected + 1))


async def run(options: Options, database: AbstractContextManager[tuple[str, str]], console: Console) -> Verdict:
    """Run it all, show it, and count. `database` gives a DSN, and a migrated schema in it that is the demo's own.

    Raises:
        Error: the database or a worker did not start.
    """
    verdict = Verdict(expected=options.events)
    view = View(options.events)
    with tempfile.TemporaryFile("w+") as log:
        # Two stacks: the processes start first, since they take a second to import, and yet end before the database.
        async with contextlib.AsyncExitStack() as outer, contextlib.AsyncExitStack() as inner:
            workers = [await inner.enter_async_context(_worker(log.fileno())) for _ in range(_WORKERS)]
            client = await inner.enter_async_context(_client())
            dsn, schema = await _entered(outer, database)
            screen = inner.enter_context(Screen(console, view))
            for worker in workers:
                _tell(worker.process, dsn=dsn, schema=schema)
                view.pids.append(worker.process.pid)
            for worker in workers:
                await _until_accepting(worker, log)
            names = (f"{screen.worker(index)} (process {pid})" for index, pid in enumerate(view.pids))
            screen.say(f"{' and '.join(names)} are up")
            connection = await AsyncConnection.connect(dsn, autocommit=True)
            await inner.enter_async_context(connection)
            demo = _Demo(options, view, screen, verdict)
            forwarder = Forwarder([worker.port for worker in workers], demo.happened)
            url = f"http://127.0.0.1:{await forwarder.start()}/mcp"
            inner.push_async_callback(forwarder.close)
            _tell(client, url=url, events=options.events, seconds=options.seconds)
            await demo.play(client, forwarder, Watcher(connection, schema))
        if not verdict.passed:
            verdict.worker_log = _tail(log)
    return verdict


class _Demo:
    def __init__(self, options: Options, view: View, screen: Screen, verdict: Verdict) -> None:
        self._options = options
        self._view = view
        self._screen = screen
        self._verdict = verdict
        self._caller: int | None = None
        self._called = asyncio.Event()

    async def play(self, client: asyncio.subprocess.Process, forwarder: Forwarder, watcher: Watcher) -> None:
        """Until the client ends."""
        watching = asyncio.create_task(self._watch(watcher))
        cutting = asyncio.create_task(self._cut(forwarder))
        try:
            async with asyncio.timeout(self._options.seconds + _OVERTIME):
                await self._listen(client.stdout)
        except TimeoutError:
            self._screen.say("[red]the call did not end[/]")
        finally:
            for task in (watching, cutting):
                task.cancel()
            await asyncio.gather(watching, cutting, return_exceptions=True)

    async def _listen(self, client: asyncio.StreamReader | None) -> None:
        """Count what the client says that it received, until it ends."""
        assert client is not None
        every = max(1, self._options.events // 6)
        while line := await client.readline():
            facts = json.loads(line)
            if "event" in facts:
                self._verdict.received.append(facts["event"])
                self._view.received += 1
                self._screen.refresh()
                if len(self._verdict.received) % every == 0:
                    self._screen.tick(f"the client has event {facts['event']} of {self._options.events}")
            else:
                self._verdict.result, self._verdict.failed = facts["result"], facts["failed"]
                self._view.connected_to = None
                self._screen.say(f"the client has the result: {escape(repr(facts['result']))}")

    async def _cut(self, forwarder: Forwarder) -> None:
        """Cut once in each of `cuts` equal parts of the call, at a random moment; every other time half open."""
        dice = random.Random(self._options.seed)
        part = self._options.seconds * 0.9 / max(1, self._options.cuts)
        loop = asyncio.get_running_loop()
        await self._called.wait()
        start = loop.time()
        for number in range(self._options.cuts):
            moment = start + part * (number + dice.uniform(0.15, 0.85))
            await asyncio.sleep(max(0.0, moment - loop.time()))
            await forwarder.cut(half_open=number % 2 == 1)

    async def _watch(self, watcher: Watcher) -> None:
        while True:
            self._view.streams = await watcher.streams()
            self._screen.refresh()
            await asyncio.sleep(0.2)

    def happened(self, event: Routed | Cut) -> None:
        """The forwarder did something."""
        worker = self._screen.worker(event.worker)
        if isinstance(event, Cut):
            self._view.cuts = self._verdict.cuts = self._verdict.cuts + 1
            self._view.connected_to = None
            self._verdict.half_open += event.half_open
            kind = "the client's side only, the worker cannot tell" if event.half_open else "both sides"
            self._screen.say(f"[red]cut {self._verdict.cuts}[/]: the connection to {worker} ({kind})")
            return
        self._view.requests[event.worker] += 1
        if event.what == "resume":
            self._view.connected_to = event.worker
            elsewhere = event.worker != self._caller
            self._verdict.resumed_elsewhere += elsewhere
            self._verdict.resumed_here += not elsewhere
            runs = "while the call runs on the other one" if elsewhere else "which runs the call"
            self._screen.say(f"[green]resumed[/] on {worker}, {runs}")
        elif event.what == "tools/call":
            self._caller = self._view.connected_to = event.worker
            self._called.set()
            self._screen.say(f"the call runs on {worker}")
        else:
            self._screen.say(f"[dim]{event.what}[/] went to {worker}")


@dataclass(frozen=True, slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    port: int


@contextlib.asynccontextmanager
async def _worker(log: int) -> AsyncIterator[_Worker]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = int(listener.getsockname()[1])
        process = await _start("server", str(listener.fileno()), stdout=log, stderr=log, pass_fds=[listener.fileno()])
    try:
        yield _Worker(process, port)
    finally:
        await _end(process)


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[asyncio.subprocess.Process]:
    # httpx and the SDK log every cut to stderr.
    process = await _start("client", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    try:
        yield process
    finally:
        await _end(process)


async def _start(module: str, *arguments: str, **streams: Any) -> asyncio.subprocess.Process:
    # The checkout may be importable only because it is the working directory.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", f"mcp_pg_events.demo.{module}", *arguments),
        stdin=asyncio.subprocess.PIPE,  # it ends when this closes, whatever becomes of the demo
        env=environment,
        start_new_session=True,  # Ctrl-C is for the demo, which ends its processes itself
        **streams,
    )


def _tell(process: asyncio.subprocess.Process, **facts: Any) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(facts).encode() + b"\n")


async def _entered(stack: contextlib.AsyncExitStack, context: AbstractContextManager[_T]) -> _T:
    """Enter `context` in a thread, and completely even if Ctrl-C comes in between, so that it is also left."""
    entering = asyncio.create_task(asyncio.to_thread(stack.enter_context, context))
    try:
        return await asyncio.shield(entering)
    except asyncio.CancelledError:
        await entering
        raise


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), 5)
    except TimeoutError:
        process.kill()
        await process.wait()


async def _until_accepting(worker: _Worker, log: IO[str]) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _START_TIMEOUT
    while loop.time() < deadline and worker.process.returncode is None:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", worker.port)
        except OSError:
            await asyncio.sleep(0.05)
            continue
        writer.close()
        return
    raise Error(f"A worker of the demo did not start: {(_tail(log) or ['it said nothing'])[-1]}.")


def _tail(log: IO[str]) -> list[str]:
    log.seek(0)
    return log.read().strip().splitlines()[-20:]
