"""An incremental parser of server-sent events, after the WHATWG HTML standard, section 9.2.6.

It differs on purpose in two ways: an event without data is kept (MCP's priming event has an id and empty data), and
comments are returned (keep-alives are comments).
"""

from __future__ import annotations

import codecs
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """One event. `data` is None where there was no data field at all."""

    id: str | None
    event: str
    data: str | None
    retry: int | None

    @property
    def message(self) -> Any:
        """The JSON-RPC message of the event, or None for a priming event."""
        return json.loads(self.data) if self.data else None


@dataclass(frozen=True, slots=True)
class Comment:
    """A line that starts with a colon."""

    text: str


class SseParser:
    """Feed it bytes as they come; it returns what they completed."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict")
        self._text = ""
        self._fields: list[tuple[str, str]] = []

    def feed(self, piece: bytes) -> list[Event | Comment]:
        self._text += self._decoder.decode(piece)
        found: list[Event | Comment] = []
        start = 0
        while (line_end := self._line_end(start)) is not None:
            end, following = line_end
            if (item := self._line(self._text[start:end])) is not None:
                found.append(item)
            start = following
        self._text = self._text[start:]
        return found

    def _line_end(self, start: int) -> tuple[int, int] | None:
        """Where the line that begins at `start` ends, and where the next one begins; None while it is incomplete."""
        ends = [at for at in (self._text.find("\n", start), self._text.find("\r", start)) if at >= 0]
        if not ends:
            return None
        end = min(ends)
        if self._text[end] == "\r":
            if end + 1 == len(self._text):
                return None  # a line feed may still follow
            if self._text[end + 1] == "\n":
                return end, end + 2
        return end, end + 1

    def _line(self, line: str) -> Event | Comment | None:
        if line.startswith(":"):
            return Comment(line[1:].removeprefix(" "))
        if line:
            name, _, value = line.partition(":")
            self._fields.append((name, value.removeprefix(" ")))
            return None
        fields, self._fields = self._fields, []
        if not fields:
            return None
        last = dict(fields)
        data = [value for name, value in fields if name == "data"]
        retry = last.get("retry")
        return Event(
            last.get("id"),
            last.get("event") or "message",
            "\n".join(data) if data else None,
            int(retry) if retry is not None else None,
        )
