"""Writes the finals of calls that cannot write their own: their session ended, or their worker did.

What they do, and the locks that they take, is in `sql/finish.sql`: each is one statement, since it holds up the calls'
owners. Next: the readers of those streams are woken, the owners told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import datetime
from typing import Any, Final, NamedTuple

from . import telemetry
from .appends import Identity
from .arrays import Int8Array
from .database import Database
from .finals import MESSAGES, final_error
from .hub import Hub
from .queries import Queries

__all__ = ["Finisher", "Suspect"]

logger = logging.getLogger(__name__)

IDLE_AT_ONCE: Final = 100
PATIENCE: Final = 5.0
"""What the end of a session or of a worker may take, in seconds: it waits for the appends under way."""


def _encoded(reason: str) -> str:
    return json.dumps(final_error(reason), separators=(",", ":"))


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
    ) -> None:
        self._database = database
        self._queries = queries
        self._hub = hub
        self._wake = wake
        self._prefix = channel_prefix
        self._identity = identity
        self._on_session_ended = on_session_ended

    async def end_session(self, asking: dict[str, Any]) -> bool:
        """End the session that `asking` names if it lives and is the asker's; False when there is none."""
        return await self._end(self._queries.end_session, asking)

    async def expire_idle(self, server: str, idle_timeout: float) -> int:
        """End what has been idle for `idle_timeout` seconds by the database's clock; how many sessions."""
        ended = 0
        while True:
            idle = await self._database.fetch(
                self._queries.idle_sessions, {"server": server, "idle": idle_timeout, "limit": IDLE_AT_ONCE}
            )
            for (session_id,) in idle:
                ended += await self._end(
                    self._queries.end_idle_session, {"session": session_id, "idle": idle_timeout, "reason": "idle"}
                )
            if len(idle) < IDLE_AT_ONCE:
                return ended

    async def _end(self, statement: bytes, parameters: dict[str, Any]) -> bool:
        session_id = parameters["session"]
        reason = parameters["reason"]
        error = _encoded(reason if reason in MESSAGES else "session_ended")
        [(finished,)] = await self._database.fetch_once(statement, parameters | {"error": error}, patience=PATIENCE)
        if finished is None:
            return False
        telemetry.reaped(len(finished) - 1, "session_ended")  # one is its standalone stream
        self._on_session_ended(session_id)
        self._announce(set(finished))
        # All workers: also those that have no more of it than an object in memory.
        await self._database.fetch(
            self._queries.tell_others,
            {"me": self._identity.number, "prefix": self._prefix, "payload": f"e{session_id}"},
        )
        return True

    async def reap(self, suspect: Suspect) -> bool:
        """Declare another worker dead, if it is as it was seen once its row is locked, and end its calls.

        True when this call did it. Doing it again, or from two workers at once, changes nothing.
        """
        return await self._end_worker(suspect.number, "worker_lost", suspect, PATIENCE)

    async def end_worker(self, number: int, reason: str, *, patience: float = PATIENCE) -> bool:
        """End a number that is or was this worker's own, and the calls that still run under it."""
        return await self._end_worker(number, reason, None, patience)

    async def _end_worker(self, number: int, reason: str, suspect: Suspect | None, patience: float) -> bool:
        parameters = {
            "worker": number,
            "reason": reason,
            "error": _encoded(reason),
            "seen": suspect.seen_at if suspect else None,
            "locked": suspect.locked if suspect else None,
        }
        with telemetry.span("reap"):
            [(calls, closed)] = await self._database.fetch_once(self._queries.end_worker, parameters, patience=patience)
        if calls is None:
            return False
        telemetry.reaped(len(calls), reason)
        level = logging.INFO if reason == "shutdown" else logging.WARNING
        logger.log(level, "Worker %d is gone (%s); %d running calls ended with it", number, reason, len(calls))
        self._announce({*calls, *(closed or ())})
        return True

    async def suspects(self, unresponsive: float) -> list[Suspect]:
        """Other workers without their lock, or without a stamp for `unresponsive` seconds."""
        parameters = {"me": self._identity.number, "unresponsive": unresponsive}
        return [Suspect(*row) for row in await self._database.fetch(self._queries.suspects, parameters)]

    async def finish_own(self, streams: list[int], reason: str) -> None:
        """End calls of this worker's own that will not end by themselves."""
        rows = await self._database.fetch(
            self._queries.finish_calls,
            {"streams": Int8Array(streams), "error": _encoded(reason)},
            patience=PATIENCE,
        )
        telemetry.reaped(len(rows), reason)
        self._announce({number for (number,) in rows})

    def _announce(self, streams: set[int]) -> None:
        for number in streams:
            self._hub.wake(number)
        self._wake(streams)
