"""The life of this worker and the death of others.

Alive is who holds its advisory lock, or goes on stamping its row. Dead is: lock free *and* no stamp for the grace; or
no stamp for very long, since a frozen process holds its lock for ever. Only a worker whose own listener has been up for
a while judges, since a restart of the database frees every lock at once. Next: `finish.py` ends the calls.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from . import tasks
from .appends import Identity
from .database import Database
from .errors import Error
from .finish import Finisher, Suspect
from .listener import Listener
from .queries import Queries

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

WATCH_INTERVAL: Final = 0.3
STAMP_INTERVAL: Final = 5.0
STAMP_INTERVAL_DEAF: Final = 0.25
GRACE: Final = 1.0
TRUST: Final = 5.0
"""How long this worker's own listener has to be up before it judges others, in seconds."""


class Watch:
    """Stamps this worker's row, ends dead workers, and finds out when this one was declared dead itself."""

    def __init__(
        self,
        database: Database,
        queries: Queries,
        identity: Identity,
        listener: Listener,
        finisher: Finisher,
        *,
        unresponsive_timeout: float,
        on_declared_dead: Callable[[], None],
        on_fenced: Callable[[], None],
    ) -> None:
        self._database = database
        self._queries = queries
        self._listener = listener
        self._finisher = finisher
        self._unresponsive_timeout = unresponsive_timeout
        self._on_declared_dead = on_declared_dead
        self._on_fenced = on_fenced
        self._identity = identity
        self._free: dict[int, tuple[Suspect, float]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._stamp(), name="mcp_pg_events.stamp"),
            asyncio.create_task(self._watch(), name="mcp_pg_events.watch"),
        ]

    async def stop(self) -> None:
        await tasks.end(*self._tasks)
        self._tasks = []

    async def _stamp(self) -> None:
        while True:
            number = self._identity.number
            try:
                rows = await self._database.fetch(self._queries.stamp, {"me": number}, patience=1)
                if number != self._identity.number:
                    continue
                if not rows:
                    self._on_declared_dead()
                elif rows[0][0] != self._identity.epoch:
                    # Somebody ended calls of this worker, and the notification may have been lost.
                    self._on_fenced()
            except Error:
                # Whoever cannot stamp cannot write either, and the writer says so.
                pass
            waited = 0.0
            while waited < (STAMP_INTERVAL if self._listener.up_since is not None else STAMP_INTERVAL_DEAF):
                await asyncio.sleep(STAMP_INTERVAL_DEAF)
                waited += STAMP_INTERVAL_DEAF

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            up_since = self._listener.up_since
            if up_since is None or loop.time() - up_since < TRUST:
                self._free.clear()
                continue
            try:
                await self._look(loop.time())
            except Error as error:
                logger.debug("Other workers cannot be watched for now: %s", error)
            except Exception:
                logger.debug("Other workers cannot be watched for now", exc_info=True)

    async def _look(self, now: float) -> None:
        free: dict[int, tuple[Suspect, float]] = {}
        for suspect in await self._finisher.suspects(self._unresponsive_timeout):
            since = now
            if not suspect.locked:
                # The grace begins when its lock is first seen free, and again with each stamp: a worker that has only
                # lost its listener stamps several times a second.
                known, first = self._free.get(suspect.number, (None, now))
                since = first if known == suspect else now
                free[suspect.number] = suspect, since
            if suspect.locked or now - since >= GRACE:
                await self._finisher.reap(suspect)
        self._free = free
