"""New sessions under a server's `max_sessions`, without counting the sessions for each.

Every new session takes two of the numbers that streams have: its standalone stream's and that of its `initialize`. So
where a count found 40 live sessions, and 1,000 was the newest number then, at most 40 + (1,100 - 1,000) / 2 have
numbers up to 1,100, whoever opened them; calls take numbers too, so in truth there are fewer. As long as that bound
stays within the limit a session is opened without a count, beside others that are. Each holds the count's lock in share
mode from before it has its numbers until its commit: what a count has not seen has higher numbers than its own.

Of two sessions that are opened at once, the bound of the one with the higher number has the other in it.
Next: `log.py` owns what was opened.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final

from psycopg.rows import TupleRow

from .backend import SessionLimit
from .database import Connection, Database
from .queries import Queries

__all__ = ["Admission"]

KNOWN_FOR: Final = 60.0
"""For how long (seconds) a count is good: a failover that loses numbers gives them out again."""


@dataclass(frozen=True, slots=True)
class _Count:
    sessions: int
    number: int
    until: float

    def allows(self, number: int, limit: int) -> bool:
        """Whether a session, of whose numbers this is the higher, is within the limit for certain."""
        return self.number < number and self.sessions + (number - self.number) // 2 <= limit


class _Uncertain(Exception):
    """Only a count can tell whether there is room."""


class Admission:
    """Opens sessions, of each server no more than its limit at a time."""

    def __init__(self, database: Database, queries: Queries) -> None:
        self._database = database
        self._queries = queries
        self._counts: dict[str, _Count] = {}
        self._newest = 0

    async def open(self, parameters: dict[str, Any], limit: int | None) -> TupleRow | None:
        """What the statement `open_session` gives. Raises `SessionLimit`."""

        async def unlimited(connection: Connection) -> TupleRow | None:
            return await (await connection.execute(self._queries.open_session, parameters)).fetchone()

        async def uncounted(connection: Connection) -> TupleRow | None:
            assert count is not None and limit is not None
            await connection.execute(self._queries.share_count, parameters)
            if (row := await unlimited(connection)) is not None:
                number = max(row[0], row[1])
                self._newest = max(self._newest, number)
                if not count.allows(number, limit):
                    raise _Uncertain
            return row

        async def counted(connection: Connection) -> TupleRow | None:
            await connection.execute(self._queries.lock_count, parameters)
            row = await (
                await connection.execute(self._queries.count_sessions, parameters | {"limit": limit})
            ).fetchone()
            assert row is not None and limit is not None
            sessions: int = row[0]
            if sessions >= limit:
                raise SessionLimit(f"{limit} sessions are already open")
            if (row := await unlimited(connection)) is not None:
                number = max(row[0], row[1])
                self._newest = max(self._newest, number)
                self._counts[parameters["server"]] = _Count(sessions + 1, number, time.monotonic() + KNOWN_FOR)
            return row

        if limit is None:
            return await self._database.transaction(unlimited)
        count = self._counts.get(parameters["server"])
        # Before anything is written: the next number is above the newest that is known here.
        if count is not None and time.monotonic() < count.until and count.allows(self._newest + 2, limit):
            try:
                return await self._database.transaction(uncounted)
            except _Uncertain:
                pass
        return await self._database.transaction(counted)
