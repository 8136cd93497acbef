"""Writes the finals of calls that cannot write their own: their session ended, or their worker did.

Always the same order of locks (session, workers by number, streams by number), so that two of these never deadlock, and
always the owners' rows first: that waits for the append under way and refuses those after it (see `queries.py`,
`lock_workers`). Next: the readers of those streams are woken, the owners told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final, NamedTuple

from mcp_types import CONNECTION_CLOSED
from psycopg.rows import TupleRow

from .appends import MARGIN, Identity
from .arrays import Int8Array
from .database import Connection, Database
from .hub import Hub
from .queries import Queries

__all__ = ["Finisher", "Suspect", "final_error"]

logger = logging.getLogger(__name__)

IDLE_AT_ONCE: Final = 100
PATIENCE: Final = 5.0
"""What the end of a session or of a worker may take, in seconds: it waits for the appends under way."""

_MESSAGES: Final = {
    "worker_lost": "The worker running this request is gone",
    "session_ended": "The session ended before this request completed",
    "shutdown": "The server shut down before this request completed",
    "not_stored": "A message of this request could not be stored",
    "data_lost": "The server's database lost a part of this response",
    "outage": "The server lost its database before this request completed",
    "process_lost": "The server's process ended before this request completed",
}


def final_error(reason: str) -> dict[str, Any]:
    """The JSON-RPC error object of a call that ends without its result: code -32000, and `reason` in its data."""
    return {"code": CONNECTION_CLOSED, "message": _MESSAGES[reason], "data": {"reason": reason}}


class Suspect(NamedTuple):
    """A worker that may be dead: its last stamp, and whether it holds its lock."""

    number: int
    seen_at: datetime
    locked: bool


class Finisher:
    """Ends sessions and dead workers; `on_session_ended` is told at once which session ended from here."""

    def __init__(
        self,
        database: Database,
        queries: Queries,
        identity: Identity,
        hub: Hub,
        wake: Callable[[set[int]], None],
        on_session_ended: Callable[[str], None],
        channel_prefix: str,
        schema_oid: int,
    ) -> None:
        self._database = database
        self._queries = queries
        self._hub = hub
        self._wake = wake
        self._prefix = channel_prefix
        self._schema_oid = schema_oid
        self._identity = identity
        self._on_session_ended = on_session_ended

    async def end_session(self, asking: dict[str, Any]) -> bool:
        """End the session that `asking` names if it lives and is the asker's; False when there is none."""
        return await self._end(self._queries.lock_session, asking)

    async def expire_idle(self, server: str, idle_timeout: float) -> int:
        """End what has been idle for `idle_timeout` seconds by the database's clock; how many sessions."""
        ended = 0
        while True:
            idle = await self._database.fetch(
                self._queries.idle_sessions, {"server": server, "idle": idle_timeout, "limit": IDLE_AT_ONCE}
            )
            for (session_id,) in idle:
                ended += await self._end(
                    self._queries.lock_idle_session, {"session": session_id, "idle": idle_timeout, "reason": "idle"}
                )
            if len(idle) < IDLE_AT_ONCE:
                return ended

    async def _end(self, lock: bytes, parameters: dict[str, Any]) -> bool:
        session_id = parameters["session"]

        async def end(connection: Connection) -> set[int] | None:
            cursor = await connection.execute(lock, parameters)
            if await cursor.fetchone() is None:
                return None
            await connection.execute(self._queries.end_session, parameters)
            cursor = await connection.execute(self._queries.open_streams, {"session": session_id})
            streams = await cursor.fetchall()
            reason = parameters["reason"]
            finished = await self._finish(connection, streams, reason if reason in _MESSAGES else "session_ended")
            cursor = await connection.execute(self._queries.close_standalone, {"session": session_id})
            return finished | {number for (number,) in await cursor.fetchall()}

        finished = await self._database.transaction(end, patience=PATIENCE)
        if finished is None:
            return False
        self._on_session_ended(session_id)
        self._announce(finished)
        # All workers: also those that have no more of it than an object in memory.
        await self._database.fetch(
            self._queries.tell_others,
            {"me": self._identity.number, "prefix": self._prefix, "payload": f"e{session_id}"},
        )
        return True

    async def reap(self, suspect: Suspect, unresponsive: float) -> bool:
        """Declare another worker dead, if it is as it was seen once its row is locked, and end its calls.

        True when this call did it. Doing it again, or from two workers at once, changes nothing.
        """

        async def still(connection: Connection) -> bool:
            cursor = await connection.execute(self._queries.suspects, self._suspecting(unresponsive))
            return suspect in [Suspect(*row) for row in await cursor.fetchall()]

        return await self._end_worker(suspect.number, "worker_lost", still, PATIENCE)

    async def end_worker(self, number: int, reason: str, *, patience: float = PATIENCE) -> bool:
        """End a number that is or was this worker's own, and the calls that still run under it."""

        async def sure(connection: Connection) -> bool:
            return True

        return await self._end_worker(number, reason, sure, patience)

    async def _end_worker(
        self, number: int, reason: str, check: Callable[[Connection], Awaitable[bool]], patience: float
    ) -> bool:
        async def end(connection: Connection) -> set[int] | None:
            await connection.execute(self._queries.lock_bound_sessions, {"worker": number})
            await connection.execute(self._queries.lock_workers, {"workers": Int8Array([number])})
            if not await check(connection):
                return None
            cursor = await connection.execute(self._queries.end_worker, {"worker": number, "reason": reason})
            if await cursor.fetchone() is None:
                return None
            cursor = await connection.execute(self._queries.worker_streams, {"worker": number})
            finished = await self._finish(connection, await cursor.fetchall(), reason)
            cursor = await connection.execute(self._queries.end_bound_sessions, {"worker": number, "reason": reason})
            closed.update([number for (number,) in await cursor.fetchall()])
            await connection.execute(self._queries.forget_readers, {"worker": number})
            await connection.execute(self._queries.forget_letters, {"worker": number})
            return finished

        closed: set[int] = set()
        finished = await self._database.transaction(end, patience=patience)
        if finished is None:
            return False
        level = logging.INFO if reason == "shutdown" else logging.WARNING
        logger.log(level, "Worker %d is gone (%s); %d running calls ended with it", number, reason, len(finished))
        self._announce(finished | closed)
        return True

    async def suspects(self, unresponsive: float) -> list[Suspect]:
        """Other workers without their lock, or without a stamp for `unresponsive` seconds."""
        return [
            Suspect(*row) for row in await self._database.fetch(self._queries.suspects, self._suspecting(unresponsive))
        ]

    def _suspecting(self, unresponsive: float) -> dict[str, Any]:
        return {"me": self._identity.number, "schema_oid": self._schema_oid, "unresponsive": unresponsive}

    async def finish_own(self, streams: list[int], reason: str) -> None:
        """End calls of this worker's own that will not end by themselves."""

        async def end(connection: Connection) -> set[int]:
            cursor = await connection.execute(self._queries.worker_streams, {"worker": self._identity.number})
            rows = [row for row in await cursor.fetchall() if row[0] in set(streams)]
            return await self._finish(connection, rows, reason)

        self._announce(await self._database.transaction(end, patience=PATIENCE))

    async def _finish(self, connection: Connection, streams: list[TupleRow], reason: str) -> set[int]:
        calls = [(number, worker, created_at) for number, worker, _, is_call, created_at in streams if is_call]
        if not calls:
            return set()
        owners = sorted({worker for _, worker, _ in calls if worker is not None})
        await connection.execute(self._queries.lock_workers, {"workers": Int8Array(owners)})
        await connection.execute(self._queries.fence_workers, {"workers": Int8Array(owners)})
        cursor = await connection.execute(
            self._queries.finish_streams,
            {
                "streams": Int8Array(number for number, _, _ in calls),
                "error": json.dumps(final_error(reason), separators=(",", ":")),
                "bound": min(created_at for _, _, created_at in calls) - MARGIN,
            },
            prepare=False,
        )
        return {number for (number,) in await cursor.fetchall()}

    def _announce(self, streams: set[int]) -> None:
        for number in streams:
            self._hub.wake(number)
        self._wake(streams)
