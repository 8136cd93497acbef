"""The calls that run on this worker: the open streams that it writes to, and who reads them.

Next: `writer.py` stores what they send.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from .backend import Stream

__all__ = ["Calls"]


class Calls:
    """The open streams of this worker's own, by number and by the session and key of their request."""

    def __init__(self) -> None:
        self.streams: dict[int, Stream] = {}
        self._running: dict[tuple[str, str | None], int] = {}
        self._closing = asyncio.Event()

    def __len__(self) -> int:
        return len(self.streams)

    def opened(self, stream: Stream) -> None:
        self.streams[stream.number] = stream
        self._running[stream.session_id, stream.request_key] = stream.number

    def closed(self, number: int) -> Stream | None:
        """The stream that has just ended; None where none of that number was open."""
        self._closing.set()
        stream = self.streams.pop(number, None)
        if stream is not None and self._running.get((stream.session_id, stream.request_key)) == number:
            del self._running[stream.session_id, stream.request_key]
        return stream

    def owns(self, number: int) -> bool:
        return number in self.streams

    def running(self, session_id: str, request_key: str) -> int | None:
        """The stream of the session's request that runs here under this key."""
        return self._running.get((session_id, request_key))

    def sessions(self) -> set[str]:
        """The sessions with a call that runs here."""
        return {stream.session_id for stream in self.streams.values()}

    def numbers(self, sessions: Callable[[], set[str]] | None = None) -> list[int]:
        """The streams of the calls that run here, all or those of some sessions."""
        if sessions is None:
            return list(self.streams)
        wanted = sessions()
        return [number for number, stream in self.streams.items() if stream.session_id in wanted]

    async def wait(self, sessions: Callable[[], set[str]] | None = None) -> None:
        """Return when no such call runs here."""
        while self.numbers(sessions):
            self._closing.clear()
            await self._closing.wait()

    def attached(self, number: int, generation: int, *, here: bool) -> None:
        """A reader attached to a stream, here or elsewhere. Which of two is the newer, its generation says: what is
        heard of the other worker's may come before or after this one's own."""
        stream = self.streams.get(number)
        if stream is not None and generation > stream.reader_generation:
            stream.reader_generation, stream.read_elsewhere = generation, not here
