"""A reader of a stream without a database and without a server: a log in memory, and a client that may stall."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any, cast

from mcp_pg_events.backend import Event, EventLog, Page
from mcp_pg_events.errors import DatabaseUnavailable
from mcp_pg_events.hub import Hub
from mcp_pg_events.reader import ReaderOptions, SSEReader
from tests.support import sse

NOW = datetime(2026, 1, 1, tzinfo=UTC)
STREAM = 7
NEVER = 3600.0


class MemoryLog:
    """What the reader needs of a log. `grow` is another worker's append: nobody here is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.reads: list[int] = []
        self.generation = 1
        self.floor = 0
        self.page_size = 500
        self.ended = False
        self.failing = False
        self.during_read: Callable[[], None] = lambda: None
        """Called when a read has seen what there is, and has not returned yet."""
        self._failed = asyncio.Event()

    async def failed(self) -> None:
        """Wait until a read has failed from now on."""
        self._failed.clear()
        await asyncio.wait_for(self._failed.wait(), 5)

    def grow(self, count: int = 1, *, size: int = 1, final: bool = False) -> list[Event]:
        last = len(self.events)
        new = [Event(last + n, b'"' + b"x" * size + b'"', final and n == count, NOW) for n in range(1, count + 1)]
        self.events += new
        self.ended |= final
        return new

    async def read(self, stream: int, after: int, bound: datetime) -> Page:
        assert stream == STREAM
        if self.failing:
            self._failed.set()
            raise DatabaseUnavailable
        self.reads.append(after)
        page = [event for event in self.events if event.seq > max(after, self.floor)][: self.page_size]
        last = page[-1].seq if page else after
        ended = self.ended and last == len(self.events)
        found = Page(page, ended, self.generation, self.floor > after, len(page) == self.page_size)
        self.during_read()
        return found

    def bound_after(self, event: Event) -> datetime:
        return event.created_at


class Client:
    """The ASGI side of a connection: what it got, and whether it takes anything."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.parser = sse.SseParser()
        self.items: list[sse.Event | sse.Comment] = []
        self.taking = asyncio.Event()
        self.taking.set()
        self.blocked = asyncio.Event()
        self.gone = asyncio.Event()
        self._changed = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.taking.is_set():
            self.blocked.set()
            await self.taking.wait()
        self.sent.append(message)
        self.items += self.parser.feed(message.get("body", b""))
        self._changed.set()

    @property
    def seqs(self) -> list[int]:
        """The numbers of the events with data, in the order of their arrival."""
        return [int((e.id or "").split("-")[1]) for e in self.items if isinstance(e, sse.Event) and e.data]

    @property
    def ended_cleanly(self) -> bool:
        return bool(self.sent) and self.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}

    async def until(self, seq: int) -> None:
        """Wait until the event of this number has arrived."""
        await self._wait_for(lambda: seq in self.seqs)

    async def kept_alive(self, times: int) -> None:
        """Wait until so many keep-alives have arrived."""
        await self._wait_for(lambda: self.items.count(sse.Comment("keep-alive")) >= times)

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


class Reading:
    """A response under way, and everything around it."""

    def __init__(self, log: MemoryLog, *, position: int = 0, primes: bool = True, **options: Any) -> None:
        self.log = log
        self.hub = Hub()
        self.subscription = self.hub.subscribe(STREAM, "session", 1)
        self.client = Client()
        self.reader = SSEReader(
            cast(EventLog, log),
            self.subscription,
            position=position,
            bound=NOW,
            primes=primes,
            options=ReaderOptions(**{"keep_alive": NEVER, "poll_interval": NEVER, **options}),
        )
        self.task = asyncio.create_task(self.reader.respond(self.client.receive, self.client.send, [(b"a", b"b")]))

    def live(self, count: int = 1, *, size: int = 1, final: bool = False) -> None:
        """This worker's appends: stored, then published."""
        for event in self.log.grow(count, size=size, final=final):
            self.hub.publish(STREAM, event)

    async def stall(self) -> None:
        """One event arrives, and the client does not take the next until `client.taking` is set."""
        self.live(1)
        await self.client.until(1)
        self.client.taking.clear()
        self.live(1)
        await self.client.blocked.wait()

    async def end(self) -> None:
        async with asyncio.timeout(5):
            await self.task


@contextlib.asynccontextmanager
async def reading(log: MemoryLog | None = None, **arguments: Any) -> AsyncIterator[Reading]:
    running = Reading(log or MemoryLog(), **arguments)
    try:
        yield running
    finally:
        running.task.cancel()
        await asyncio.gather(running.task, return_exceptions=True)
