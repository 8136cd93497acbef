"""Group commit: one task and one connection store all events of this worker.

While a flush is in flight, appends queue; the next flush takes them all, so there is no timer. An append is
acknowledged after its commit. Next: the hub gets the committed events, the waker the streams that may be read
elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import psycopg
from psycopg import errors

from .arrays import Int8Array, TextArray
from .backend import Event, Stream
from .database import Connection, Limit, is_outage, translate
from .errors import AppendRefused, DatabaseUnavailable, Error, StoreClosed, WorkerFenced
from .hub import Hub
from .queries import Queries

__all__ = ["MARGIN", "Identity", "Writer"]

logger = logging.getLogger(__name__)

MARGIN: Final = timedelta(minutes=10)
"""How far the database's clock may step back before a read's lower bound hides an event until the next poll."""

BATCH_EVENTS: Final = 1000
BATCH_BYTES: Final = 8 * 1024 * 1024
PENDING_BYTES: Final = 64 * 1024 * 1024
"""What may wait for the database before appends wait for room."""

STALL: Final = 2.0
"""A flush that takes longer (seconds) is worth a line in the log."""


_ENDED: Final = "The stream has ended, so nothing more can follow in it"


class Identity:
    """This worker's number in the database and its fence, shared by all parts; both change when it was declared
    dead."""

    __slots__ = ("epoch", "number")

    def __init__(self, number: int, epoch: int = 0) -> None:
        self.number = number
        self.epoch = epoch


class _Entry:
    __slots__ = ("done", "final", "payload", "seq", "stream")

    def __init__(self, stream: Stream, seq: int, payload: bytes, final: bool, done: asyncio.Future[int]) -> None:
        self.stream = stream
        self.seq = seq
        self.payload = payload
        self.final = final
        self.done = done


class Writer:
    """Appends of all callers, in the order in which they came, one flush at a time.

    `outage_timeout` (seconds) bounds how long appends wait for a database that does not answer; `on_lost` is called
    once when it passed, or when this worker was declared dead: every append then fails until `renew`. `on_broken` is
    called for a stream that cannot go on, since the database refuses one of its events.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        queries: Queries,
        identity: Identity,
        hub: Hub,
        wake: Callable[[set[int]], None],
        *,
        outage_timeout: float,
        on_lost: Callable[[Error], None],
        on_broken: Callable[[int], None],
    ) -> None:
        self._connect = connect
        self._queries = queries
        self._hub = hub
        self._wake = wake
        self._outage_timeout = outage_timeout
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._identity = identity
        self._connection: Connection | None = None
        self._queue: deque[_Entry] = deque()
        self._pending_bytes = 0
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._open: dict[int, Stream] = {}
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._flushes = 0
        self._unsure = False
        self._lost: Error | None = StoreClosed()
        self.stalled_since: float | None = None
        """When (loop time) the database stopped taking events; None while it takes them."""

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        self._connection = await self._connect()
        self.renew()
        self._task = asyncio.create_task(self._run(), name="mcp_pg_events.writer")

    def renew(self) -> None:
        """Go on under a new number. Streams opened under the old one stay refused."""
        self._lost = None
        self._unsure = False

    @property
    def lost(self) -> bool:
        """Whether this worker has no identity to write under, for now."""
        return self._lost is not None

    async def stop(self) -> None:
        """Store what is queued, then end. Bounded by what the caller allows."""
        if self._task is not None:
            try:
                while self._queue and self._lost is None and not self._task.done():
                    last: asyncio.Future[Any] = self._queue[-1].done
                    await asyncio.wait({last, self._task}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
        self._fail_all(StoreClosed())
        await self._drop_connection()

    def sessions(self) -> set[str]:
        """The sessions with a call that runs here."""
        return {stream.session_id for stream in self._open.values()}

    def opened(self, stream: Stream, epoch: int) -> None:
        """A stream of this worker's own, opened at `epoch`: it is told when somebody else ends it."""
        self._open[stream.number] = stream
        # Ended already, perhaps, by whoever raised the epoch while the answer was on its way here.
        self._unsure |= epoch < self._identity.epoch

    def _closed(self, number: int) -> Stream | None:
        self._closing.set()
        return self._open.pop(number, None)

    def calls(self, sessions: Callable[[], set[str]] | None = None) -> list[int]:
        """The streams of the calls that run here, all or those of some sessions."""
        if sessions is None:
            return list(self._open)
        wanted = sessions()
        return [number for number, stream in self._open.items() if stream.session_id in wanted]

    async def wait_for_calls(self, sessions: Callable[[], set[str]] | None = None) -> None:
        """Return when no such call runs here."""
        while self.calls(sessions):
            self._closing.clear()
            await self._closing.wait()

    def owns(self, number: int) -> bool:
        return number in self._open

    # --- appending ----------------------------------------------------------------------------------------------------

    async def append(self, stream: Stream, payload: bytes, *, final: bool = False) -> int:
        """Store one event; its number, once it is committed.

        A caller that is cancelled while it waits does not take the event back: its number is given, so it is stored.

        Raises:
            AppendRefused: the stream has its final, or the session ended.
            DatabaseUnavailable: the outage lasted longer than the bound.
            WorkerFenced: this worker was declared dead.
        """
        while self._pending_bytes > PENDING_BYTES and self._lost is None:
            self._room.clear()
            await self._room.wait()
        if self._lost is not None:
            raise self._lost
        if stream.closed:
            raise AppendRefused(_ENDED)
        seq = stream.next_seq
        if not stream.shared:
            stream.next_seq = seq + 1
        stream.closed = final
        entry = _Entry(stream, seq, payload, final, asyncio.get_running_loop().create_future())
        self._queue.append(entry)
        self._pending_bytes += len(payload)
        self._work.set()
        return await entry.done

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            if self._unsure and not self._queue:
                await self._flush([], self._store_own)
            while self._queue:
                own, shared = self._take()
                if own:
                    await self._flush(own, self._store_own)
                if shared:
                    await self._flush(shared, self._store_shared)

    def _take(self) -> tuple[list[_Entry], list[_Entry]]:
        own: list[_Entry] = []
        shared: list[_Entry] = []
        size = 0
        # Several objects may stand for a shared stream here, each unaware of the other's final.
        finals: set[int] = set()
        while self._queue and len(own) + len(shared) < BATCH_EVENTS and size < BATCH_BYTES:
            entry = self._queue.popleft()
            size += len(entry.payload)
            if not entry.stream.shared:
                own.append(entry)
            elif entry.stream.number in finals:
                _fail(entry, AppendRefused(_ENDED))
            else:
                shared.append(entry)
                if entry.final:
                    finals.add(entry.stream.number)
        self._pending_bytes -= size
        self._room.set()
        return own, shared

    async def _flush(self, batch: list[_Entry], store: Callable[[Sequence[_Entry], str], Awaitable[datetime]]) -> None:
        """Store a batch, whatever it takes within the bound; then publish, acknowledge, wake."""
        self._flushes += 1
        origin = f"{self._identity.number}-{self._flushes}"
        loop = asyncio.get_running_loop()
        doubtful = False
        partitions_made = 0
        pause = 0.0
        while self._lost is None:
            # Also after a refusal that another batch met while this one's events were queued.
            batch = _still_open(batch)
            if not batch and not self._unsure:
                return
            stall = loop.call_later(STALL, self._note_stall, "it does not answer")
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = await self._connect()
                with Limit(self._connection, self._time_left()):
                    if self._unsure:
                        await self._find_ended()
                        continue
                    if doubtful and await self._find_stored(batch, origin):
                        stored_at = await self._clock()
                    else:
                        stored_at = await store(batch, origin)
                self._end_stall()
                self._acknowledge(batch, stored_at)
                return
            except _Refused:
                self._unsure = True
            except errors.CheckViolation as error:
                if partitions_made == 3 or not await self._make_partition():
                    await self._refuse_or_split(batch, store, error)
                    return
                partitions_made += 1
            except (psycopg.Error, Error, OSError) as error:
                if not is_outage(error):
                    await self._refuse_or_split(batch, store, error)
                    return
                if not isinstance(error, errors.SerializationFailure | errors.DeadlockDetected):
                    doubtful = True
                    await self._drop_connection()
                self._note_stall(str(translate(error)))
                if self._time_left() <= pause:
                    self._lose(
                        DatabaseUnavailable("The database did not answer for too long, so this call was given up")
                    )
                    break
            finally:
                stall.cancel()
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2 or 0.05)
        for entry in batch:
            _fail(entry, self._lost or StoreClosed())

    async def _store_own(self, batch: Sequence[_Entry], origin: str) -> datetime:
        finals = [entry for entry in batch if entry.final]
        rows = await self._execute(
            self._queries.append,
            {
                "streams": Int8Array(entry.stream.number for entry in batch),
                "seqs": Int8Array(entry.seq for entry in batch),
                "payloads": TextArray(entry.payload for entry in batch),
                "final_streams": Int8Array(entry.stream.number for entry in finals),
                "final_seqs": Int8Array(entry.seq for entry in finals),
            },
        )
        if not rows:
            raise _Refused
        stored_at: datetime = rows[0][0]
        return stored_at

    async def _store_shared(self, batch: Sequence[_Entry], origin: str) -> datetime:
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
            raise _Refused
        for place, seq, _ in rows:
            # No number: the stream ended meanwhile. The acknowledgement tells its caller.
            batch[place - 1].seq = seq if seq is not None else 0
        stored_at: datetime = rows[0][2]
        return stored_at

    async def _execute(self, statement: bytes, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        assert self._connection is not None
        parameters |= {"me": self._identity.number, "epoch": self._identity.epoch}
        cursor = await self._connection.execute(statement, parameters)
        return await cursor.fetchall() if cursor.description else []

    def _acknowledge(self, batch: Sequence[_Entry], stored_at: datetime) -> None:
        streams = set()
        for entry in batch:
            if entry.seq == 0:
                entry.stream.closed = True
                _fail(entry, AppendRefused(_ENDED))
                continue
            streams.add(entry.stream.number)
            self._hub.publish(entry.stream.number, Event(entry.seq, entry.payload, entry.final, stored_at))
            if entry.final:
                self._closed(entry.stream.number)
            if not entry.done.done():
                entry.done.set_result(entry.seq)
        self._wake(streams)

    # --- when it does not work ----------------------------------------------------------------------------------------

    async def _find_stored(self, batch: Sequence[_Entry], origin: str) -> bool:
        """Whether a flush whose connection broke had been committed. One statement: all of it or nothing.

        Taking the worker's own row FOR UPDATE first waits for the old backend, which holds it while its flush runs.
        """
        connection = self._connection
        assert connection is not None
        async with connection.transaction():
            await connection.execute("SET LOCAL lock_timeout = '2s'")
            cursor = await connection.execute(self._queries.lock_self, {"me": self._identity.number})
            if await cursor.fetchone() is None:
                raise _Refused
            first = batch[0]
            bound = (first.stream.created_at - MARGIN) if first.stream.created_at else datetime.min
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
                return bool(row and row[0])
            cursor = await connection.execute(
                self._queries.was_appended_shared,
                {"streams": Int8Array({entry.stream.number for entry in batch}), "bound": bound, "origin": origin},
                prepare=False,
            )
            found: dict[int, deque[int]] = {}
            for stream, seq, _ in await cursor.fetchall():
                found.setdefault(stream, deque()).append(seq)
        if not found:
            return False
        for entry in batch:
            numbers = found.get(entry.stream.number)
            entry.seq = numbers.popleft() if numbers else 0
        return True

    async def _clock(self) -> datetime:
        assert self._connection is not None
        row = await (await self._connection.execute("SELECT now()")).fetchone()
        assert row is not None
        now: datetime = row[0]
        return now

    async def _make_partition(self) -> bool:
        """No partition takes the present: nobody made one ahead. An append never fails for that."""
        assert self._connection is not None
        logger.warning("No partition takes the present time; making one. Is the retention job running?")
        try:
            await self._connection.execute(self._queries.ensure_partitions, {"ahead": 2})
        except (psycopg.Error, OSError) as error:
            logger.error("A partition for the present could not be made: %s", translate(error))
            return is_outage(error)
        return True

    async def _find_ended(self) -> None:
        """The fence refused: somebody ended streams of this worker, or the worker. Which?"""
        assert self._connection is not None
        cursor = await self._connection.execute(self._queries.own_epoch, {"me": self._identity.number})
        row = await cursor.fetchone()
        if row is None:
            self._lose(WorkerFenced())
            return
        cursor = await self._connection.execute(
            self._queries.finished_streams, {"streams": Int8Array(self._open)}, prepare=False
        )
        ended = await cursor.fetchall()
        # The epoch was read first, the streams after it: what ended in between has raised the epoch again.
        self._identity.epoch = row[0]
        self._unsure = False
        for (number,) in ended:
            self.ended_elsewhere(number)

    def ended_elsewhere(self, number: int) -> None:
        """Somebody else wrote a stream's final: its call here is to end."""
        if (stream := self._closed(number)) is not None:
            stream.closed = stream.ended = True
            if stream.on_ended is not None:
                stream.on_ended()

    async def _refuse_or_split(
        self,
        batch: list[_Entry],
        store: Callable[[Sequence[_Entry], str], Awaitable[datetime]],
        error: BaseException,
    ) -> None:
        """The statement is at fault: one event must not take the others of its batch with it."""
        if len(batch) != 1:
            for entry in batch:
                await self._flush([entry], store)
            return
        entry = batch[0]
        logger.error("An event of stream %d could not be stored: %s", entry.stream.number, translate(error))
        _fail(entry, AppendRefused(f"The event was not stored: {translate(error)}"))
        if not entry.stream.shared:
            # Its number is lost, so nothing can follow it but an error that ends the stream.
            self.ended_elsewhere(entry.stream.number)
            self._on_broken(entry.stream.number)

    def _note_stall(self, why: str) -> None:
        if self.stalled_since is None:
            self.stalled_since = asyncio.get_running_loop().time()
            logger.warning("The database takes no events for now, they wait: %s", why)

    def _time_left(self) -> float:
        """How long the database may still keep events waiting, in seconds."""
        now = asyncio.get_running_loop().time()
        return max(0.0, (self.stalled_since or now) + self._outage_timeout - now)

    def _end_stall(self) -> None:
        if self.stalled_since is not None:
            waited = asyncio.get_running_loop().time() - self.stalled_since
            self.stalled_since = None
            logger.warning("The database takes events again after %.1f s", waited)

    def _lose(self, error: Error) -> None:
        """This identity is over: declared dead, or unable to write for longer than anybody waits."""
        self._fail_all(error)
        self._on_lost(error)

    def look_for_ended(self) -> None:
        """Somebody may have ended calls of this worker; the next append would have met that too."""
        self._unsure = True
        self._work.set()

    def declared_dead(self) -> None:
        """This worker's row says that it is dead; the next append would have met that too."""
        if self._lost is None:
            self._lose(WorkerFenced())

    def _fail_all(self, error: Error) -> None:
        self._lost = error
        self.stalled_since = None
        while self._queue:
            _fail(self._queue.popleft(), error)
        self._pending_bytes = 0
        self._room.set()
        for number in list(self._open):
            self.ended_elsewhere(number)

    async def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def _still_open(batch: list[_Entry]) -> list[_Entry]:
    """What is left when the events of streams that somebody else ended are refused."""
    left = [entry for entry in batch if not entry.stream.ended]
    if len(left) < len(batch):
        for entry in batch:
            if entry.stream.ended:
                _fail(entry, AppendRefused(_ENDED))
    return left


class _Refused(Exception):
    """The fence let nothing through."""


def _fail(entry: _Entry, error: Exception) -> None:
    if not entry.done.done():
        entry.done.set_exception(error)
        # A caller that was cancelled never looks; that must not be reported as an error nobody retrieved.
        entry.done.exception()
