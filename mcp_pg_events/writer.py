"""Group commit: one task and one connection store all events of this worker.

While a flush is in flight, appends queue; the next flush takes them all, so there is no timer. An append is
acknowledged after its commit. Next: the hub gets the committed events, the waker the streams that may be read
elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, Final

import psycopg
from psycopg import errors

from . import tasks, telemetry
from .appends import Appends, Entry, Identity, Refused
from .backend import Event, Stream
from .calls import Calls
from .database import Connection, is_outage, translate
from .errors import AppendRefused, DatabaseUnavailable, Error, StoreClosed, WorkerFenced
from .hub import Hub
from .pending import BATCH_EVENTS, ENDED, Pending
from .queries import Queries
from .stall import Stall

__all__ = ["Writer"]

logger = logging.getLogger(__name__)

IN_STEP: Final = 32
"""From how many events on it pays to store them in two halves."""
STALL: Final = 2.0
"""A flush that takes longer (seconds) is worth a line in the log."""

_RENEWING: Final = "This worker was declared dead and takes a new number; send the request again"
_NEVER: Final = 2**63


class Writer:
    """Appends of all callers, in the order in which they came, one flush at a time.

    `outage_timeout` (seconds) bounds how long appends wait for a database that does not answer; `on_lost` is called
    once when it passed, or when this worker was declared dead: every append then fails until `renew`. `on_broken` is
    called with a stream that cannot go on and the reason: the database refuses one of its events, or has lost some.
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
        on_broken: Callable[[int, str], None],
    ) -> None:
        self._appends = Appends(connect, queries, identity)
        self._hub = hub
        self._wake = wake
        self.stall = Stall(outage_timeout)
        self._on_lost = on_lost
        self._on_broken = on_broken
        self._identity = identity
        self._queue = Pending()
        self._taken: list[Entry] = []
        self._work = asyncio.Event()
        self.calls = Calls()
        self._task: asyncio.Task[None] | None = None
        self._flushes = 0
        self._since = 0.0  # when (loop time) the first event of the batch was appended
        self._unsure = False
        self._opened_at = _NEVER
        """The lowest epoch at which a stream was opened since the last look for those that somebody else ended."""
        self._suspicious = False
        self._lost: Error | None = StoreClosed()

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        await self._appends.ready()
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
                while self._lost is None and not self._task.done() and (self._taken or self._queue):
                    waiting: set[asyncio.Future[Any]] = {
                        entry.done for entry in (*self._taken, *self._queue) if not entry.done.done()
                    }
                    waiting.add(self._task)
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=0.05)
            finally:
                await tasks.end(self._task)
        self._fail_all(StoreClosed())
        for entry in self._taken:
            entry.fail(StoreClosed())
        await self._appends.close()

    def opened(self, stream: Stream, epoch: int) -> None:
        """A stream of this worker's own, opened at `epoch`: it is told when somebody else ends it."""
        self.calls.opened(stream)
        self._opened_at = min(self._opened_at, epoch)
        # Ended already, perhaps, by whoever raised the epoch while the answer was on its way here.
        if epoch < self._identity.epoch:
            self.look_for_ended()

    def released(self, stream: Stream) -> None:
        """Another worker may go on with a stream of this one's; nothing more is taken for it here."""
        stream.closed = True
        self.calls.closed(stream.number)

    def doubt_readers(self) -> None:
        """Readers may have attached elsewhere without a word of it coming here."""
        for stream in self.calls.streams.values():
            stream.read_elsewhere = True
        self._wake(set(self.calls.streams))

    def check_identity(self, worker: int) -> None:
        """Raise DatabaseUnavailable where `worker` is no longer this worker's number."""
        if worker != self._identity.number or self.lost:
            raise DatabaseUnavailable(_RENEWING)

    # --- appending ----------------------------------------------------------------------------------------------------

    async def append(self, stream: Stream, payload: bytes, *, final: bool = False) -> int:
        """Store one event; its number, once it is committed.

        A caller that is cancelled while it waits does not take the event back: its number is given, so it is stored.

        Raises:
            AppendRefused: the stream has its final, or the session ended.
            DatabaseUnavailable: the outage lasted longer than the bound.
            WorkerFenced: this worker was declared dead.
        """
        if self._queue.full:
            await self._wait_for_room()
        return await self._place(stream, payload, final)

    async def enqueue(
        self, stream: Stream, payload: bytes, *, final: bool = False, upstream_id: bytes | None = None
    ) -> asyncio.Future[int]:
        """As `append`, but returns once the event has its place, with what becomes of it: so one task may have many
        events on their way, in its order. `upstream_id` is what an upstream calls the event."""
        if self._queue.full:
            await self._wait_for_room()
        return self._place(stream, payload, final, upstream_id)

    async def _wait_for_room(self) -> None:
        while self._queue.full and self._lost is None:
            await self._queue.change()

    def _place(
        self, stream: Stream, payload: bytes, final: bool, upstream_id: bytes | None = None
    ) -> asyncio.Future[int]:
        if self._lost is not None:
            raise self._lost
        if stream.closed:
            raise AppendRefused(ENDED)
        seq = stream.next_seq
        if not stream.shared:
            stream.next_seq = seq + 1
        stream.closed = final
        loop = asyncio.get_running_loop()
        entry = Entry(stream, seq, payload, final, loop.create_future(), upstream_id)
        self._queue.put(entry, loop.time())
        self._work.set()
        return entry.done

    async def _run(self) -> None:
        clock = asyncio.get_running_loop().time
        began = ended = 0.0
        stored = 0
        while True:
            await self._work.wait()
            self._work.clear()
            if self._unsure and not self._queue:
                await self._flush([], self._appends.store_own)
            limit = BATCH_EVENTS
            took = ended - began
            if min(len(self._queue), stored) >= IN_STEP and took / 2 < clock() - ended < took * 10:
                # All waited for the last flush, and then the database for them. In two halves that take turns, one is
                # stored while the other's callers run; but not where a commit is what takes the time.
                limit = len(self._queue) // 2
            while self._queue:
                began = clock()
                self._since = self._queue.oldest
                own, shared = self._queue.take(limit)
                limit = BATCH_EVENTS
                self._taken = own + shared
                try:
                    if own:
                        await self._flush(own, self._appends.store_own)
                    if shared:
                        await self._flush(shared, self._appends.store_shared)
                except Exception:
                    # Nothing that was foreseen; whoever waits is told, and the others go on.
                    logger.exception("Events could not be stored")
                    self._fail_taken(AppendRefused("The event was not stored; the server's log says why"))
                stored, self._taken = len(self._taken), []
                ended = clock()

    def _fail_taken(self, error: Error) -> None:
        for entry in self._taken:
            if not entry.done.done():
                entry.fail(error)
                if not entry.stream.shared:
                    self._break(entry.stream.number)

    def _break(self, number: int, reason: str = "not_stored") -> None:
        """A stream of this worker's own cannot go on: a number is lost, and nothing can follow it but an error."""
        self.ended_elsewhere(number)
        self._on_broken(number, reason)

    async def _flush(self, batch: list[Entry], store: Callable[[Sequence[Entry], str], Awaitable[datetime]]) -> None:
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
                # Nobody waits for the database any more, whatever it does: the next stall begins anew.
                self.stall.since = None
                return
            timer = loop.call_later(STALL, self.stall.begin, "it does not answer")
            try:
                self._suspicious |= await self._appends.ready()
                with self._appends.limit(self.stall.time_left()):
                    if self._suspicious:
                        await self._find_behind()
                        continue
                    if self._unsure:
                        await self._find_ended()
                        continue
                    stored_at = await self._appends.find_stored(batch, origin) if doubtful else None
                    if stored_at is None:
                        stored_at = await store(batch, origin)
                self.stall.end()
                self._acknowledge(batch, stored_at)
                return
            except Refused:
                self._unsure = True
            except errors.CheckViolation as error:
                # A constraint's violation has its name; that no partition takes the row has none.
                if error.diag.constraint_name or partitions_made == 3 or not await self._appends.make_partition():
                    await self._refuse_or_split(batch, store, error)
                    return
                partitions_made += 1
            except (psycopg.Error, Error, OSError) as error:
                if not is_outage(error):
                    await self._refuse_or_split(batch, store, error)
                    return
                if not isinstance(error, errors.SerializationFailure | errors.DeadlockDetected):
                    doubtful = True
                    await self._appends.close()
                self.stall.begin(str(translate(error)))
                if self.stall.time_left() <= pause:
                    self._lose(
                        DatabaseUnavailable("The database did not answer for too long, so this call was given up")
                    )
                    break
            finally:
                timer.cancel()
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2 or 0.05)
        for entry in batch:
            entry.fail(self._lost or StoreClosed())

    def _acknowledge(self, batch: Sequence[Entry], stored_at: datetime) -> None:
        streams = set()
        refused = 0
        for entry in batch:
            if entry.seq == 0:
                refused += 1
                entry.stream.closed = True
                entry.fail(AppendRefused(ENDED))
                continue
            if entry.stream.shared or entry.stream.read_elsewhere:
                streams.add(entry.stream.number)
            entry.stream.stored = entry.seq
            self._hub.publish(entry.stream.number, Event(entry.seq, entry.payload, entry.final, stored_at, self._since))
            if entry.final:
                self.calls.closed(entry.stream.number)
            if not entry.done.done():
                entry.done.set_result(entry.seq)
        telemetry.stored(len(batch) - refused, asyncio.get_running_loop().time() - self._since)
        if streams:
            self._wake(streams)

    # --- when it does not work ----------------------------------------------------------------------------------------

    async def _find_ended(self) -> None:
        """The fence refused: somebody ended streams of this worker, or the worker. Which?"""
        # What is opened from here on is not asked for, and may have ended before the epoch that is about to be learned.
        self._unsure, self._opened_at = False, _NEVER
        try:
            ended = await self._appends.find_ended(self.calls.streams)
        except BaseException:
            self._unsure = True
            raise
        if ended is None:
            self._lose(WorkerFenced())
            return
        if self._opened_at < self._identity.epoch:
            self._unsure = True
        for number in ended:
            self.ended_elsewhere(number)

    async def _find_behind(self) -> None:
        """The connection was lost: has the log lost something with it?"""
        behind = await self._appends.find_behind(list(self.calls.streams.values()))
        self._suspicious = False
        for number in behind:
            logger.error("The database lost acknowledged events of stream %d, so its call ends", number)
            self._break(number, "data_lost")

    def ended_elsewhere(self, number: int) -> None:
        """Somebody else wrote a stream's final: its call here is to end."""
        if (stream := self.calls.closed(number)) is not None:
            stream.closed = stream.ended = True
            if stream.on_ended is not None:
                stream.on_ended()

    async def _refuse_or_split(
        self,
        batch: list[Entry],
        store: Callable[[Sequence[Entry], str], Awaitable[datetime]],
        error: BaseException,
    ) -> None:
        """The statement is at fault: one event must not take the others of its batch with it."""
        if len(batch) != 1:
            for entry in batch:
                await self._flush([entry], store)
            return
        entry = batch[0]
        logger.error("An event of stream %d could not be stored: %s", entry.stream.number, translate(error))
        entry.fail(AppendRefused(f"The event was not stored: {translate(error)}"))
        if not entry.stream.shared:
            self._break(entry.stream.number)

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
        self.stall.since = None
        self._queue.fail(error)
        for number in list(self.calls.streams):
            self.ended_elsewhere(number)


def _still_open(batch: list[Entry]) -> list[Entry]:
    """What is left when the events of streams that somebody else ended are refused."""
    left = [entry for entry in batch if not entry.stream.ended]
    if len(left) < len(batch):
        for entry in batch:
            if entry.stream.ended:
                entry.fail(AppendRefused(ENDED))
    return left
