"""The statements that store events, on the one connection of the writer.

One statement is one commit: all of a batch is stored, or nothing of it. Next: `writer.py` decides what to do about a
refusal, an outage, a commit of unknown outcome.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import psycopg

from .arrays import Int8Array, TextArray
from .backend import Stream
from .database import Connection, Limit, is_outage, translate
from .direct import Direct
from .queries import Queries

__all__ = ["MARGIN", "Appends", "Entry", "Identity", "Refused"]

logger = logging.getLogger(__name__)

MARGIN: Final = timedelta(minutes=10)
"""How far the database's clock may step back before a read's lower bound hides an event until the next poll."""

_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Identity:
    """This worker's number in the database and its fence, shared by all parts; both change when it was declared
    dead."""

    __slots__ = ("epoch", "number")

    def __init__(self, number: int, epoch: int = 0) -> None:
        self.number = number
        self.epoch = epoch


class Entry:
    """One event on its way into the log. `seq` is 0 where a shared stream took it no more."""

    __slots__ = ("done", "final", "payload", "seq", "stream", "upstream_id")

    def __init__(
        self,
        stream: Stream,
        seq: int,
        payload: bytes,
        final: bool,
        done: asyncio.Future[int],
        upstream_id: bytes | None = None,
    ) -> None:
        self.stream = stream
        self.upstream_id = upstream_id
        self.seq = seq
        self.payload = payload
        self.final = final
        self.done = done

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)
            # A caller that was cancelled never looks; that must not be reported as an error nobody retrieved.
            self.done.exception()


class Refused(Exception):
    """The fence let nothing through: somebody ended streams of this worker, or the worker."""


class Appends:
    """A connection, made when it is needed, and what the writer does with it."""

    def __init__(self, connect: Callable[[], Awaitable[Connection]], queries: Queries, identity: Identity) -> None:
        self._connect = connect
        self._queries = queries
        self._identity = identity
        self._made = 0
        self.connection: Connection | None = None
        self._direct: Direct | None = None

    async def ready(self) -> bool:
        """Have a connection; True where it stands in for one that was lost."""
        if self.connection is not None and not self.connection.closed:
            return False
        self.connection = await self._connect()
        self._direct = Direct(self.connection)
        self._made += 1
        return self._made > 1

    async def close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            await connection.close()

    def limit(self, seconds: float) -> Limit:
        """A bound on what is done with the connection inside the block."""
        assert self.connection is not None
        return Limit(self.connection, seconds)

    async def store_own(self, batch: Sequence[Entry], origin: str) -> datetime:
        """Store events of this worker's own streams; when that was. Raises `Refused`."""
        finals = [entry for entry in batch if entry.final]
        statement = self._queries.append
        parameters: dict[str, Any] = {
            "streams": Int8Array(entry.stream.number for entry in batch),
            "seqs": Int8Array(entry.seq for entry in batch),
            "payloads": TextArray(entry.payload for entry in batch),
            "final_streams": Int8Array(entry.stream.number for entry in finals),
            "final_seqs": Int8Array(entry.seq for entry in finals),
        }
        if any(entry.upstream_id is not None for entry in batch):
            statement = self._queries.append_relayed
            parameters["upstream_ids"] = TextArray(entry.upstream_id for entry in batch)
        rows = await self._execute(statement, parameters)
        if not rows:
            raise Refused
        stored_at: datetime = rows[0][0]
        return stored_at

    async def store_shared(self, batch: Sequence[Entry], origin: str) -> datetime:
        """The same for shared streams, which number the entries; 0 where the stream ended meanwhile."""
        rows = await self._execute(
            self._queries.append_shared,
            {
                "streams": Int8Array(entry.stream.number for entry in batch),
                "payloads": TextArray(entry.payload for entry in batch),
                "finals": Int8Array(int(entry.final) for entry in batch),
                "origin": origin,
            },
        )
        if not rows:
            raise Refused
        for place, seq, _ in rows:
            # No number: the stream ended meanwhile. The acknowledgement tells its caller.
            batch[place - 1].seq = seq if seq is not None else 0
        stored_at: datetime = rows[0][2]
        return stored_at

    async def find_stored(self, batch: Sequence[Entry], origin: str) -> datetime | None:
        """Whether a flush whose connection broke had been committed, and then the time. Raises `Refused`.

        Taking the worker's own row FOR UPDATE first waits for the old backend, which holds it while its flush runs.
        """
        connection = self.connection
        assert connection is not None
        async with connection.transaction():
            await connection.execute("SET LOCAL lock_timeout = '2s'")
            cursor = await connection.execute(self._queries.lock_self, {"me": self._identity.number})
            if await cursor.fetchone() is None:
                raise Refused
            first = batch[0]
            bound = (first.stream.created_at - MARGIN) if first.stream.created_at else _BEGINNING
            if not first.stream.shared:
                cursor = await connection.execute(
                    self._queries.was_appended,
                    {
                        "stream": first.stream.number,
                        "seq": first.seq,
                        "bound": bound,
                        "payload": first.payload.decode(),
                    },
                    prepare=False,
                )
                row = await cursor.fetchone()
                return await self._clock() if row and row[0] else None
            cursor = await connection.execute(
                self._queries.was_appended_shared,
                {"streams": Int8Array({entry.stream.number for entry in batch}), "bound": bound, "origin": origin},
                prepare=False,
            )
            found: dict[int, deque[int]] = {}
            for stream, seq, _ in await cursor.fetchall():
                found.setdefault(stream, deque()).append(seq)
        if not found:
            return None
        for entry in batch:
            numbers = found.get(entry.stream.number)
            entry.seq = numbers.popleft() if numbers else 0
        return await self._clock()

    async def _clock(self) -> datetime:
        assert self.connection is not None
        row = await (await self.connection.execute("SELECT now()")).fetchone()
        assert row is not None
        now: datetime = row[0]
        return now

    async def make_partition(self) -> bool:
        """No partition takes the present: nobody made one ahead. An append never fails for that."""
        assert self.connection is not None
        logger.warning("No partition takes the present time; making one. Is the retention job running?")
        try:
            await self.connection.execute(self._queries.ensure_partitions, {"ahead": 2})
        except (psycopg.Error, OSError) as error:
            logger.error("A partition for the present could not be made: %s", translate(error))
            return is_outage(error)
        return True

    async def find_ended(self, streams: Iterable[int]) -> list[int] | None:
        """After a refusal: which of `streams` somebody else ended, None when it was this worker. Learns the epoch."""
        assert self.connection is not None
        cursor = await self.connection.execute(self._queries.own_epoch, {"me": self._identity.number})
        row = await cursor.fetchone()
        if row is None:
            return None
        cursor = await self.connection.execute(
            self._queries.finished_streams, {"streams": Int8Array(streams)}, prepare=False
        )
        ended = await cursor.fetchall()
        # The epoch was read first, the streams after it: what ended in between has raised the epoch again.
        self._identity.epoch = row[0]
        return [number for (number,) in ended]

    async def find_behind(self, streams: Sequence[Stream]) -> list[int]:
        """After a reconnection: the streams of which the log has less than was acknowledged, as after a failover that
        lost its tail. What follows in them gets numbers that no client was given."""
        assert self.connection is not None
        known = [stream for stream in streams if stream.stored and stream.created_at is not None]
        if not known:
            return []
        cursor = await self.connection.execute(
            self._queries.behind,
            {
                "streams": Int8Array(stream.number for stream in known),
                "stored": Int8Array(stream.stored for stream in known),
                "bound": min(stream.created_at for stream in known if stream.created_at is not None) - MARGIN,
            },
            prepare=False,
        )
        return [number for (number,) in await cursor.fetchall()]

    async def _execute(self, statement: bytes, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        assert self._direct is not None
        return await self._direct.fetch(
            statement, parameters | {"me": self._identity.number, "epoch": self._identity.epoch}
        )
