"""Writes the finals of calls that cannot write their own: their session ended, or their worker did.

Always the same order of locks (session, workers by number, streams by number), so that two of these never deadlock, and
always the owners' rows first: that waits for the append under way and refuses those after it (see `queries.py`,
`lock_workers`). Next: the readers of those streams are woken, the owners told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, Final

from mcp_types import CONNECTION_CLOSED
from psycopg.rows import TupleRow

from .appends import MARGIN, Identity
from .arrays import Int8Array
from .database import Connection, Database
from .hub import Hub
from .queries import Queries

__all__ = ["Finisher", "final_error"]

logger = logging.getLogger(__name__)

PATIENCE: Final = 5.0
"""What the end of a session or of a worker may take, in seconds: it waits for the appends under way."""

_MESSAGES: Final = {
    "worker_lost": "The worker running this request is gone",
    "session_ended": "The session ended before this request completed",
    "shutdown": "The server shut down before this request completed",
    "not_stored": "A message of this request could not be stored",
    "data_lost": "The server's database lost a part of this response",
    "outage": "The server lost its database before this request completed",
}


def final_error(reason: str) -> dict[str, Any]:
    """The JSON-RPC error object of a call that ends without its result: code -32000, and `reason` in its data."""
    return {"code": CONNECTION_CLOSED, "message": _MESSAGES[reason], "data": {"reason": reason}}


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
        for (session_id,) in await self._database.fetch(
            self._queries.idle_sessions, {"server": server, "idle": idle_timeout}
        ):
            ended += await self._end(
                self._queries.lock_idle_session, {"session": session_id, "idle": idle_timeout, "reason": "idle"}
            )
        return ended

    async def _end(self, lock: bytes, parameters: dict[str, Any]) -> bool:
        session_id = parameters["session"]

        async def end(connection: Connection) -> tuple[list[TupleRow], set[int]] | None:
            cursor = await connection.execute(lock, parameters)
            if await cursor.fetchone() is None:
                return None
            await connection.execute(self._queries.end_session, parameters)
            cursor = await connection.execute(self._queries.open_streams, {"session": session_id})
            streams = await cursor.fetchall()
            finished = await self._finish(connection, streams, "session_ended")
            cursor = await connection.execute(self._queries.close_standalone, {"session": session_id})
            return streams, finished | {number for (number,) in await cursor.fetchall()}

        ended = await self._database.transaction(end, patience=PATIENCE)
        if ended is None:
            return False
        streams, finished = ended
        self._on_session_ended(session_id)
        self._announce(finished)
        elsewhere = {worker for row in streams for worker in row[1:3] if worker is not None} - {self._identity.number}
        if elsewhere:
            await self._database.fetch(
                self._queries.notify,
                {"workers": Int8Array(sorted(elsewhere)), "prefix": self._prefix, "payload": f"e{session_id}"},
            )
        return True

    async def reap(
        self, worker: int, reason: str, *, grace: float, unresponsive: float, patience: float = PATIENCE
    ) -> bool:
        """Declare a worker dead, if it still looks it once its row is locked, and end its calls; or this one, for good.

        True when this call did it. Doing it again, or from two workers at once, changes nothing.
        """

        async def end(connection: Connection) -> set[int] | None:
            await connection.execute(self._queries.lock_workers, {"workers": Int8Array([worker])})
            if worker != self._identity.number and worker not in await self._suspects(connection, grace, unresponsive):
                return None
            cursor = await connection.execute(self._queries.end_worker, {"worker": worker, "reason": reason})
            if await cursor.fetchone() is None:
                return None
            cursor = await connection.execute(self._queries.worker_streams, {"worker": worker})
            finished = await self._finish(connection, await cursor.fetchall(), reason)
            await connection.execute(self._queries.forget_readers, {"worker": worker})
            return finished

        finished = await self._database.transaction(end, patience=patience)
        if finished is None:
            return False
        level = logging.INFO if reason == "shutdown" else logging.WARNING
        logger.log(level, "Worker %d is gone (%s); %d running calls ended with it", worker, reason, len(finished))
        self._announce(finished)
        return True

    async def suspects(self, grace: float, unresponsive: float) -> list[int]:
        """Other workers that look dead: `grace` without lock and stamp, or `unresponsive` without a stamp (seconds)."""
        rows = await self._database.fetch(self._queries.suspects, self._suspecting(grace, unresponsive))
        return [number for (number,) in rows]

    async def _suspects(self, connection: Connection, grace: float, unresponsive: float) -> list[int]:
        cursor = await connection.execute(self._queries.suspects, self._suspecting(grace, unresponsive))
        return [number for (number,) in await cursor.fetchall()]

    def _suspecting(self, grace: float, unresponsive: float) -> dict[str, Any]:
        return {
            "me": self._identity.number,
            "schema_oid": self._schema_oid,
            "grace": grace,
            "unresponsive": unresponsive,
        }

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
