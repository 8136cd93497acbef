"""A connection of a part's own, made anew in the background when it is lost. Next: `direct.py`, which runs on it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

import psycopg

from . import tasks
from .database import Connection
from .direct import Direct
from .errors import Error

__all__ = ["Kept"]

logger = logging.getLogger(__name__)


class Kept:
    """`connection` and `direct` are None while there is none; whoever needs it then goes another way."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]]) -> None:
        self._connect = connect
        self.connection: Connection | None = None
        self.direct: Direct | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._have(await self._connect())
        self._task = asyncio.create_task(self._reconnect(), name="mcp_pg_events.kept")

    async def stop(self) -> None:
        await tasks.end(self._task)
        await self._close()

    async def lose(self) -> None:
        """It is of no use any more, or in an unknown state."""
        await self._close()
        self._lost.set()

    def _have(self, connection: Connection) -> None:
        self.connection, self.direct = connection, Direct(connection)

    async def _reconnect(self) -> None:
        pause = 0.0
        while True:
            await self._lost.wait()
            try:
                self._have(await self._connect())
                self._lost.clear()
                pause = 0.0
            except (psycopg.Error, Error, OSError) as error:
                logger.debug("There is no connection yet: %s", error)
                pause = min(1.0, pause * 2 or 0.05)
                await asyncio.sleep(pause)

    async def _close(self) -> None:
        connection, self.connection, self.direct = self.connection, None, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                await connection.close()
