"""Group commit for the streams of requests: one statement opens those of all requests that wait for theirs.

While one is under way, requests queue; the next takes them all, as the writer does with events. The statement does the
plain case alone, a session that lives and a request id that is free. What it leaves out (a session that is unknown or
just ends, an id that is taken) and what an outage keeps from it, `log.py` asks for one by one, and so finds out why.
Next: `log.py` hands the stream to `session.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

import psycopg

from . import tasks
from .appends import Identity
from .arrays import TextArray
from .backend import SessionKey
from .database import Connection, Limit, is_outage, translate
from .kept import Kept
from .queries import Queries

__all__ = ["Opened", "Opener"]

logger = logging.getLogger(__name__)

PATIENCE: Final = 2.0
"""How long (seconds) the database has to answer: as long as for a request that asks by itself."""
REQUESTS_AT_ONCE: Final = 200
IN_TURNS: Final = 4
"""Of requests that came together, and whose work is another process's, a quarter is opened at a time, and so many at
least: that process so begins sooner, and they do not stay in step, in which each process waits for the other."""
_FOREVER: Final = 1e9
"""An idle time-out (seconds) that no session reaches: a parameter of this statement has always the same type."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream that was opened for `worker` to write to, and what is to be known of its session."""

    worker: int
    epoch: int
    number: int
    created_at: datetime
    protocol_version: str
    told: int


@dataclass(slots=True, eq=False)
class _Asked:
    key: SessionKey
    request_id: str
    request_key: str
    method: str
    elsewhere: bool
    done: asyncio.Future[Opened | None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def answer(self, opened: Opened | None) -> None:
        if not self.done.done():
            self.done.set_result(opened)


class Opener:
    """One connection, and the requests that wait for it. `on_stale` gets the sessions that are to be stamped."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        queries: Queries,
        identity: Identity,
        on_stale: Callable[[set[str]], None],
    ) -> None:
        self._kept = Kept(connect)
        self._queries = queries
        self._identity = identity
        self._on_stale = on_stale
        self._waiting: list[_Asked] = []
        self._leading = False
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self._kept.start()

    async def stop(self) -> None:
        await tasks.end(self._follower)
        await self._kept.stop()

    async def open(
        self, key: SessionKey, request_id: str, request_key: str, method: str, elsewhere: bool = False
    ) -> Opened | None:
        """Open the stream of a request; None when that has to be asked for by itself. `elsewhere` says that its work is
        another process's.

        Raises:
            DatabaseUnavailable: the database does not answer.
        """
        if self._kept.connection is None:
            return None
        asked = _Asked(key, request_id, request_key, method, elsewhere)
        self._waiting.append(asked)
        if not self._leading:
            # In this task: a request that comes alone is spared the way to another one and back.
            await self._lead()
        return await asked.done

    async def _lead(self) -> None:
        self._leading = True
        first, most = self._waiting[0].key, REQUESTS_AT_ONCE
        batch: list[_Asked] = []
        later: list[_Asked] = []
        if self._waiting[0].elsewhere:
            most = min(most, max(IN_TURNS, len(self._waiting) // 4))
        for asked in self._waiting:
            # Of one app, whose name and idle time-out are parameters of the statement.
            alike = asked.key.server == first.server and asked.key.idle_timeout == first.idle_timeout
            (batch if alike and len(batch) < most else later).append(asked)
        self._waiting = later
        try:
            await self._open(batch)
        except (psycopg.Error, OSError) as error:
            await self._lose(batch, error)
        finally:
            for asked in batch:
                asked.answer(None)
            if self._waiting:
                self._follower = asyncio.create_task(self._lead(), name="mcp_pg_events.opening")
            else:
                self._leading = False

    async def _open(self, batch: list[_Asked]) -> None:
        if (connection := self._kept.connection) is None or (direct := self._kept.direct) is None:
            return
        me, key = self._identity.number, batch[0].key
        parameters = {
            "me": me,
            "server": key.server,
            "idle": _FOREVER if key.idle_timeout is None else float(key.idle_timeout),
            "touch": float(key.touch_interval),
            "sessions": TextArray(asked.key.session_id.encode() for asked in batch),
            "owners": TextArray(None if asked.key.owner is None else asked.key.owner.encode() for asked in batch),
            "request_ids": TextArray(asked.request_id.encode() for asked in batch),
            "request_keys": TextArray(asked.request_key.encode() for asked in batch),
            "methods": TextArray(asked.method.encode() for asked in batch),
        }
        with Limit(connection, PATIENCE):
            rows = await direct.fetch(self._queries.open_streams, parameters)
        stale: set[str] = set()
        for place, number, created_at, protocol_version, told, epoch, is_stale in rows:
            asked = batch[place - 1]
            asked.answer(Opened(me, epoch, number, created_at, protocol_version.decode(), told))
            if is_stale:
                stale.add(asked.key.session_id)
        if stale:
            self._on_stale(stale)

    async def _lose(self, batch: list[_Asked], error: psycopg.Error | OSError) -> None:
        if not is_outage(error):
            # Each is asked for by itself, and so meets its own error.
            logger.debug("Requests are opened one by one: %s", translate(error))
            return
        if isinstance(error, TimeoutError):
            # They have waited for as long as they would by themselves.
            for asked in batch:
                if not asked.done.done():
                    asked.done.set_exception(translate(error))
                    asked.done.exception()
        await self._kept.lose()
