"""Messages that landed on another worker than the one that runs what they are about.

They wait in the `inbox` table, durable before their client got its 202, and are taken in the order of their arrival.
Next: `sessions.py` (or `proxy/`) gives each to its session.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from . import tasks
from .appends import Identity
from .arrays import Int8Array
from .database import Database
from .errors import Error
from .queries import Queries

__all__ = ["CarriedStream", "Inbox"]

logger = logging.getLogger(__name__)

POLL_INTERVAL: Final = 5.0
PAGE_LETTERS: Final = 100
PAGE_BYTES: Final = 4_000_000


@dataclass(frozen=True, slots=True)
class CarriedStream:
    """The stream that another worker opened for a request, to be run here; it was open at `epoch`."""

    number: int
    created_at: datetime
    request_key: str
    epoch: int


class Inbox:
    """Collects this worker's letters when it is told of them, and now and then in case nobody told it."""

    def __init__(
        self,
        database: Database,
        queries: Queries,
        identity: Identity,
        deliver: Callable[[str, str, CarriedStream | None], None],
    ) -> None:
        self._database = database
        self._queries = queries
        self._identity = identity
        self._deliver = deliver
        self._arrived = asyncio.Event()
        self._delivered: set[int] = set()
        self._collecting = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="mcp_pg_events.inbox")

    async def stop(self) -> None:
        await tasks.end(self._task)

    def check(self) -> None:
        """There may be something in it."""
        self._arrived.set()

    async def _run(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_INTERVAL):
                    await self._arrived.wait()
            except TimeoutError:
                pass
            self._arrived.clear()
            try:
                await self.collect()
            except Error as error:
                logger.debug("The inbox was not read: %s", error)
                await asyncio.sleep(0.5)
                self._arrived.set()

    async def collect(self) -> None:
        """Return when every letter that is stored by now has been delivered."""
        async with self._collecting:
            while await self._collect():
                pass

    async def _collect(self) -> bool:
        """Deliver a page of letters, and then remove it; whether there may be more."""
        me = self._identity.number
        letters = await self._database.fetch(
            self._queries.letters, {"me": me, "limit": PAGE_LETTERS, "page": PAGE_BYTES}
        )
        if me != self._identity.number:
            # Declared dead meanwhile: what they are about has ended, and they go with the old number.
            return bool(letters)
        for letter, session_id, payload, stream, created_at, request_key, epoch in letters:
            # Each once, also where its removal failed.
            if letter in self._delivered:
                continue
            self._delivered.add(letter)
            if stream is not None and created_at is None:
                # The request's final was written while it was on its way.
                continue
            carried = None if stream is None else CarriedStream(stream, created_at, request_key, epoch)
            try:
                self._deliver(session_id, payload, carried)
            except Exception:
                logger.exception("A message for session %s could not be delivered", session_id)
        if letters:
            ids = [letter for letter, *_ in letters]
            await self._database.fetch(self._queries.remove_letters, {"me": me, "ids": Int8Array(ids)})
            self._delivered.difference_update(ids)
        return bool(letters)
