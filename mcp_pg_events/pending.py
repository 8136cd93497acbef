"""The events that wait for the next flush, in the order in which they came. Next: `writer.py` takes and stores them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from typing import Final

from .appends import Entry
from .errors import AppendRefused

__all__ = ["BATCH_EVENTS", "ENDED", "Pending"]

BATCH_EVENTS: Final = 1000
BATCH_BYTES: Final = 8 * 1024 * 1024
PENDING_BYTES: Final = 64 * 1024 * 1024
"""What may wait for the database before appends wait for room."""

ENDED: Final = "The stream has ended, so nothing more can follow in it"


class Pending:
    """A queue with room for so many bytes. `oldest` is when (loop time) the first event in it was put there."""

    def __init__(self) -> None:
        self.oldest = 0.0
        self._queue: deque[Entry] = deque()
        self._bytes = 0
        self._room = asyncio.Event()

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._queue)

    @property
    def full(self) -> bool:
        """Whether another event has to wait for room."""
        return self._bytes > PENDING_BYTES

    async def change(self) -> None:
        """Return when some of the events are gone."""
        self._room.clear()
        await self._room.wait()

    def put(self, entry: Entry, now: float) -> None:
        if not self._queue:
            self.oldest = now
        self._queue.append(entry)
        self._bytes += len(entry.payload)

    def take(self, limit: int) -> tuple[list[Entry], list[Entry]]:
        """The next batch, of at most `limit` events: those of this worker's own streams, and those of shared ones."""
        own: list[Entry] = []
        shared: list[Entry] = []
        size = 0
        # Several objects may stand for a shared stream here, each unaware of the other's final.
        finals: set[int] = set()
        while self._queue and len(own) + len(shared) < min(limit, BATCH_EVENTS) and size < BATCH_BYTES:
            entry = self._queue.popleft()
            size += len(entry.payload)
            if not entry.stream.shared:
                own.append(entry)
            elif entry.stream.number in finals:
                entry.fail(AppendRefused(ENDED))
            else:
                shared.append(entry)
                if entry.final:
                    finals.add(entry.stream.number)
        self._bytes -= size
        self._room.set()
        return own, shared

    def fail(self, error: Exception) -> None:
        """Refuse all that is left."""
        while self._queue:
            self._queue.popleft().fail(error)
        self._bytes = 0
        self._room.set()
