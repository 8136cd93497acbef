"""A `text/event-stream` as it arrives, in events (HTML standard, section 9.2.6).

Next: `relay.py`, which stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["EventStream", "EventTooLarge", "ServerSentEvent"]

ID_BYTES: Final = 4096
"""Longer ids are not kept, and count as none."""


class EventTooLarge(Exception):
    """An event is larger than it may be."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event. `id` is None where it has none of its own; `data` is empty where an event only says its id."""

    event: bytes
    data: bytes
    id: bytes | None

    @property
    def cursor(self) -> bytes | None:
        """Its id, if it can be resumed from: an empty one takes back the one before (HTML standard, 9.2.6), and what is
        not UTF-8 would come back as something else."""
        try:
            return self.id if self.id and self.id.decode() else None
        except UnicodeDecodeError:
            return None


class EventStream:
    """Takes the bytes of a response, and gives events of at most `limit` bytes. `retry` is the upstream's last hint, in
    seconds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begun: list[bytes] = []
        self._size = 0
        self._after_cr = False
        self._first = True
        self._event = b""
        self._data: list[bytes] = []
        self._id: bytes | None = None
        self.retry: float | None = None

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """The events that end in `data`. Raises `EventTooLarge`."""
        if not data:
            return []
        if self._after_cr and data.startswith(b"\n"):
            data = data[1:]
        self._after_cr = data.endswith(b"\r")
        found: list[ServerSentEvent] = []
        for piece in data.splitlines(keepends=True):
            self._size += len(piece)
            if self._size > self._limit:
                raise EventTooLarge
            self._begun.append(piece.rstrip(b"\r\n"))
            if piece.endswith((b"\r", b"\n")):
                line = b"".join(self._begun)
                self._begun.clear()
                self._take(line, found)
        return found

    def _take(self, line: bytes, found: list[ServerSentEvent]) -> None:
        if self._first:
            self._first = False
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            self._size = 0
            if self._data or self._id is not None:
                found.append(ServerSentEvent(self._event or b"message", b"\n".join(self._data), self._id))
            self._event, self._data, self._id = b"", [], None
            return
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        match name:
            case b"data":
                self._data.append(value)
            case b"event":
                self._event = value
            case b"id" if b"\0" not in value and len(value) <= ID_BYTES:
                self._id = value
            case b"retry" if value.isdigit() and len(value) < 10:
                self.retry = int(value) / 1000
            case _:
                # A comment, or an unknown field; a stream of nothing else is not one large event.
                if not self._data:
                    self._size = 0
