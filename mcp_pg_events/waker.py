"""Tells other workers that streams which their clients read have grown.

After a commit the writer leaves here the streams that may be read elsewhere: those of which it was told so by the
commit that attached the reader (`sql/tell_owner.sql`), and those that several workers write to. One statement, on a
connection of its own, looks up who reads them now, and notifies those workers; while it runs, further streams gather,
so notifications coalesce. It may not ride in the append's transaction (NOTIFY takes a database-wide lock until the
commit), nor look before the commit (a reader that attaches in between would miss both the history and the wake-up).
A reader that attached before a commit which does not know of it yet is woken when its attachment is heard of.
Next: `listener.py` on the other worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable

import psycopg

from . import tasks, telemetry
from .appends import Identity
from .arrays import Int8Array
from .database import Connection, Limit, is_outage, translate
from .direct import Direct
from .errors import Error
from .queries import Queries

__all__ = ["Waker"]

logger = logging.getLogger(__name__)

KEYS_AT_ONCE = 2000
PATIENCE = 5.0


class Waker:
    """A set of streams to announce, and the task that announces it. Losing it only delays: readers also poll."""

    def __init__(
        self, connect: Callable[[], Awaitable[Connection]], queries: Queries, identity: Identity, channel_prefix: str
    ) -> None:
        self._connect = connect
        self._queries = queries
        self._prefix = channel_prefix
        self._identity = identity
        self._streams: set[int] = set()
        self._work = asyncio.Event()
        self._announced = asyncio.Event()
        self._announced.set()
        self._connection: Connection | None = None
        self._direct: Direct | None = None
        self._task: asyncio.Task[None] | None = None
        self.sent = 0
        """Notifications sent so far."""

    async def start(self) -> None:
        await self._open()
        self._task = asyncio.create_task(self._run(), name="mcp_pg_events.waker")

    async def stop(self) -> None:
        """Announce what is left, for a moment at most, then end."""
        if self._task is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self._announced.wait()
            await tasks.end(self._task)
        await self._drop_connection()

    def add(self, streams: set[int]) -> None:
        self._streams |= streams
        self._work.set()
        self._announced.clear()

    async def _run(self) -> None:
        pause = 0.0
        while True:
            await self._work.wait()
            self._work.clear()
            # Out of the set before it is announced: what is stored meanwhile in the same streams comes with the next
            # one, since this one's look at who reads may have been too early for it.
            batch = list(itertools.islice(self._streams, KEYS_AT_ONCE))
            self._streams.difference_update(batch)
            try:
                await self._announce(batch)
                pause = 0.0
            except (psycopg.Error, Error, OSError) as error:
                if is_outage(error):
                    self._streams.update(batch)
                else:
                    logger.error("Other workers cannot be woken, their readers poll instead: %s", translate(error))
                await self._drop_connection()
                pause = min(1.0, pause * 2 or 0.05)
                await asyncio.sleep(pause)
            if self._streams:
                self._work.set()
            else:
                self._announced.set()

    async def _announce(self, batch: list[int]) -> None:
        if not batch:
            return
        if self._connection is None or self._connection.closed:
            await self._open()
        assert self._connection is not None and self._direct is not None
        with Limit(self._connection, PATIENCE):
            ((sent, _),) = await self._direct.fetch(
                self._queries.wake, {"streams": Int8Array(batch), "me": self._identity.number, "prefix": self._prefix}
            )
        self.sent += sent
        telemetry.notified(sent)

    async def _open(self) -> None:
        self._connection = await self._connect()
        self._direct = Direct(self._connection)

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()
