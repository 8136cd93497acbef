"""Who holds what, as the database has it. Next: `show`."""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import AsyncConnection, sql
from psycopg.rows import TupleRow

__all__ = ["Stream", "Watcher"]

_STREAMS = """
SELECT s.number, s.method, runs.pid, reads.pid, s.final_seq IS NOT NULL,
       (SELECT count(*) FROM {schema}.events e WHERE e.stream = s.number)
  FROM {schema}.streams s
  LEFT JOIN {schema}.workers runs ON runs.number = s.worker
  LEFT JOIN {schema}.workers reads ON reads.number = s.reader_worker AND s.final_seq IS NULL
 ORDER BY s.number
"""


@dataclass(frozen=True, slots=True)
class Stream:
    """A row of `streams`; `runs_on` and `read_from` are process ids."""

    number: int
    method: str
    runs_on: int | None
    read_from: int | None
    ended: bool
    stored: int


class Watcher:
    """Reads the demo's tables over one connection."""

    def __init__(self, connection: AsyncConnection[TupleRow], schema: str) -> None:
        self._connection = connection
        self._streams = sql.SQL(_STREAMS).format(schema=sql.Identifier(schema))

    async def streams(self) -> list[Stream]:
        rows = await (await self._connection.execute(self._streams)).fetchall()
        return [Stream(number, method or "GET (standalone)", *rest) for number, method, *rest in rows]
