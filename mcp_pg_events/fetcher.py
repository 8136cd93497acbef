"""Reads of the log, batched: while one read is under way, the readers that wake meanwhile share the next.

A woken worker so answers all its woken streams with one statement. For what is recent it is prepared, on a connection
of its own, with its bound as a literal: planning takes several times as long as reading does, and a plan that is made
for a parameter would lock and probe every partition. What is older is planned each time.
Next: `reader.py` writes what comes back.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg

from . import tasks
from .appends import MARGIN
from .arrays import Int8Array
from .backend import Event, Page
from .database import Connection, Database, Limit, translate
from .errors import StoreClosed
from .kept import Kept
from .queries import Queries

__all__ = ["Fetcher"]

logger = logging.getLogger(__name__)

STREAMS_AT_ONCE: Final = 200
PAGE_EVENTS: Final = 500
PAGE_BYTES: Final = 1_000_000
BATCH_BYTES: Final = 8_000_000

STEP: Final = timedelta(minutes=10)
"""For how long a plan serves; what is older than two of these and the margin is read with a plan of its own."""
PATIENCE: Final = 2.0

_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)


class _Request:
    __slots__ = ("after", "bound", "page", "stream")

    def __init__(self, stream: int, after: int, bound: datetime, page: asyncio.Future[Page]) -> None:
        self.stream = stream
        self.after = after
        self.bound = bound
        self.page = page


class Fetcher:
    """One read at a time, of as many streams as wait for one."""

    def __init__(
        self, connect: Callable[[], Awaitable[Connection]], database: Database, queries: Queries, *, prepares: bool
    ) -> None:
        async def connect_to_read() -> Connection:
            connection = await connect()
            # The plan serves for as long as `STEP`. It is made for any streams, and for partitions that are empty yet.
            await connection.execute("SET plan_cache_mode = force_generic_plan")
            await connection.execute("SET enable_seqscan = off")
            return connection

        self._kept = Kept(connect_to_read) if prepares else None
        self._database = database
        self._queries = queries
        self._waiting: deque[_Request] = deque()
        self._work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._clock: datetime | None = None

    async def start(self) -> None:
        if self._kept is not None:
            await self._kept.start()
        self._task = asyncio.create_task(self._run(), name="mcp_pg_events.fetcher")

    async def stop(self) -> None:
        await tasks.end(self._task)
        self._task = None
        if self._kept is not None:
            await self._kept.stop()
        while self._waiting:
            _fail(self._waiting.popleft().page, StoreClosed())

    async def read(self, stream: int, after: int, bound: datetime) -> Page:
        """The next page of `stream` after number `after`, none of whose events is older than `bound`.

        Raises:
            DatabaseUnavailable: it cannot be read now; asking again later is right.
        """
        if self._task is None:
            raise StoreClosed
        request = _Request(stream, after, bound, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self._work.set()
        return await request.page

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting:
                batch: dict[int, _Request] = {}
                later: list[_Request] = []
                while self._waiting and len(batch) < STREAMS_AT_ONCE:
                    request = self._waiting.popleft()
                    if request.page.done():
                        continue
                    # Two readers of one stream (the newer has just attached) take turns.
                    if request.stream in batch:
                        later.append(request)
                    else:
                        batch[request.stream] = request
                self._waiting.extendleft(later)
                if not batch:
                    continue
                try:
                    await self._read(batch)
                except Exception as error:
                    for request in batch.values():
                        _fail(request.page, translate(error))

    async def _read(self, batch: dict[int, _Request]) -> None:
        bound = min(request.bound for request in batch.values())
        # A database whose clock was set back stores rows below the bound that its older rows gave.
        if self._clock is not None:
            bound = min(bound, self._clock - MARGIN)
        requests = list(batch.values())
        pages, holes = await self._query(requests, bound)
        if holes:
            # The clock was set back by more than the margin: the bound hid something.
            again, still = await self._query(holes, _BEGINNING)
            pages |= again
            # An ended stream has its end, unless that left with its partition.
            pages |= {
                request.stream: replace(pages[request.stream], expired=True)
                for request in still
                if not pages[request.stream].events and not pages[request.stream].ended
            }
        for request in requests:
            page = pages.get(request.stream)
            if page is None:
                # The stream's row is gone: its session was removed.
                page = Page((), True, 0, False)
            if not request.page.done():
                request.page.set_result(page)

    async def _query(self, requests: list[_Request], bound: datetime) -> tuple[dict[int, Page], list[_Request]]:
        page_bytes = max(50_000, min(PAGE_BYTES, BATCH_BYTES // len(requests)))
        rows = await self._rows(
            {
                "streams": Int8Array(request.stream for request in requests),
                "after": Int8Array(request.after for request in requests),
                "limit": PAGE_EVENTS,
                "page": page_bytes,
            },
            bound,
        )
        events: dict[int, list[Event]] = {request.stream: [] for request in requests}
        facts: dict[int, tuple[int | None, int, int]] = {}
        read_at = asyncio.get_running_loop().time()
        for stream, final_seq, generation, floor, seq, created_at, payload, now in rows:
            self._clock = now
            facts[stream] = (final_seq, generation, floor)
            if seq is not None:
                # Of the first one alone: how late its stream is.
                since = 0.0 if events[stream] else read_at - (now - created_at).total_seconds()
                payload = payload if isinstance(payload, bytes) else payload.encode()
                events[stream].append(Event(seq, payload, seq == final_seq, created_at, since))
        pages: dict[int, Page] = {}
        holes: list[_Request] = []
        for request in requests:
            if request.stream not in facts:
                continue
            final_seq, generation, floor = facts[request.stream]
            found = events[request.stream]
            if found:
                contiguous = found[0].seq == request.after + 1 and found[-1].seq == request.after + len(found)
            else:
                contiguous = final_seq is None or request.after >= final_seq
            expired = (not contiguous and floor > request.after) or (not found and floor > request.after)
            if not contiguous and not expired:
                holes.append(request)
            last = found[-1].seq if found else request.after
            more = len(found) >= PAGE_EVENTS or sum(len(event.payload) for event in found) >= page_bytes
            pages[request.stream] = Page(found, final_seq is not None and last >= final_seq, generation, expired, more)
        return pages, holes

    async def _rows(self, parameters: dict[str, Any], bound: datetime) -> list[tuple[Any, ...]]:
        if self._kept is not None and self._kept.direct is not None and self._clock is not None:
            recent = _floor(self._clock - MARGIN)
            if bound >= recent:
                statement = self._queries.read.replace(b"%(bound)s", b"'%b'" % recent.isoformat().encode())
                try:
                    assert self._kept.connection is not None
                    with Limit(self._kept.connection, PATIENCE):
                        return await self._kept.direct.fetch(statement, parameters, alone=True)
                except (psycopg.Error, OSError) as error:
                    logger.debug("The connection to read on is given up: %s", translate(error))
                    await self._kept.lose()
        return await self._database.fetch(self._queries.read, parameters | {"bound": bound}, prepare=False)


def _floor(moment: datetime) -> datetime:
    """The last but one full `STEP` before a moment."""
    since = moment - _BEGINNING
    return moment - since % STEP - STEP


def _fail(future: asyncio.Future[Page], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
        future.exception()
