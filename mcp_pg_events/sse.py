"""Frames of a `text/event-stream` (HTML standard, section 9.2), as bytes.

A payload is one line already: JSON writes control characters as escapes. Next: the client.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["KEEP_ALIVE", "format_event_id", "frame", "parse_event_id", "priming_frame"]

KEEP_ALIVE: Final = b": keep-alive\n\n"

_EVENT_ID: Final = re.compile(r"(0|[1-9][0-9]{0,18})-(0|[1-9][0-9]{0,18})", re.ASCII)


def format_event_id(stream: int, seq: int) -> str:
    """The id of an event on the wire, opaque to clients."""
    return f"{stream}-{seq}"


def parse_event_id(text: str) -> tuple[int, int] | None:
    """The stream and the number that an event id names, None when it cannot be one of ours."""
    match = _EVENT_ID.fullmatch(text)
    return (int(match[1]), int(match[2])) if match else None


def frame(stream: int, seq: int, payload: bytes) -> bytes:
    """One message event."""
    return b"event: message\nid: %d-%d\ndata: %b\n\n" % (stream, seq, payload)


def priming_frame(stream: int, seq: int, retry: int | None) -> bytes:
    """An event with a cursor and no data, and the reconnection time in milliseconds (specification, 2025-11-25,
    "Streamable HTTP": what a client needs to resume before anything came)."""
    hint = b"" if retry is None else b"retry: %d\n" % retry
    return b"id: %d-%d\n%bdata: \n\n" % (stream, seq, hint)
