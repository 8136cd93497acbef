"""The file that carries one session: JSON Lines, read and written line by line.

A header with the session, a line for each stream, a line for each event, and an end with their counts, without which
the file was cut. Every value is checked here, so that what a database is given has the types and the bounds that it
needs. Next: `transfer.py`, which reads the rows and writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from ..errors import Error

__all__ = ["FIELDS", "FORMAT", "VERSION", "Broken", "Line", "dumped", "read"]

FORMAT: Final = "mcp-pg-events session"
VERSION: Final = 1

NUMBERS: Final = 2**53
"""Bound of a stream's number: a sequence that was raised near its end would stop a server."""

EARLIEST: Final = datetime(2020, 1, 1, tzinfo=UTC)
LATEST: Final = datetime(2200, 1, 1, tzinfo=UTC)
"""Bounds of a time, so that none lies where dates cannot be reckoned with."""

_TEXT: Final = (str,)
_OPTIONAL: Final = (str, type(None))
FIELDS: Final[dict[str, dict[str, tuple[type, ...]]]] = {
    "session": {
        "id": _TEXT,
        "server": _TEXT,
        "owner": _OPTIONAL,
        "initialize": _OPTIONAL,
        "protocol_version": _OPTIONAL,
        "log_level": _OPTIONAL,
        "subscriptions": (list,),
        "worker": (int, type(None)),
        "told": (int,),
        "upstream": _OPTIONAL,
        "created_at": (datetime,),
        "seen_at": (datetime,),
        "ended_at": (datetime, type(None)),
        "ended_reason": _OPTIONAL,
    },
    "stream": {
        "number": (int,),
        "request_id": _OPTIONAL,
        "request_key": _OPTIONAL,
        "method": _OPTIONAL,
        "shared": (bool,),
        "upstream_id": _OPTIONAL,
        "reader_generation": (int,),
        "cursor": (int,),
        "last_seq": (int,),
        "mark_seq": (int,),
        "mark_at": (datetime,),
        "floor": (int,),
        "final_seq": (int, type(None)),
        "created_at": (datetime,),
        "ended_at": (datetime, type(None)),
    },
    "event": {
        "stream": (int,),
        "seq": (int,),
        "created_at": (datetime,),
        "origin": _OPTIONAL,
        "upstream_id": _OPTIONAL,
        "payload": _TEXT,
    },
    "end": {"streams": (int,), "events": (int,)},
}


class Broken(Error):
    """The file is not what an export wrote."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line: `header`, `stream`, `event` or `end`, and its values by their columns' names."""

    kind: str
    values: dict[str, Any]


def dumped(kind: str, values: dict[str, Any]) -> str:
    """One line of the file, in ASCII, without its end."""
    return json.dumps({"type": kind} | values, default=lambda value: value.astimezone(UTC).isoformat())


def read(lines: Iterable[str]) -> Iterator[Line]:
    """The lines of a file, checked one by one and in their order.

    Raises:
        Broken: it was cut, changed, or is something else.
    """
    stage = -1
    order = ("header", "stream", "event", "end")
    number = 0
    for number, text in enumerate(lines, 1):
        try:
            values = json.loads(text)
            kind = values.pop("type")
            at = order.index(kind)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise Broken(f"Line {number} of the file is none that an export wrote; was it cut?") from None
        if at < stage or (stage == -1) != (kind == "header") or stage == order.index("end"):
            raise Broken(f"Line {number} of the file, {kind!r}, is in the wrong place; nothing was imported.")
        if kind == "header":
            _check_header(values)
            values["session"] = _checked(number, "session", values.get("session"))
        else:
            values = _checked(number, kind, values)
        stage = at
        yield Line(kind, values)
    if stage != order.index("end"):
        raise Broken(f"The file ends after line {number}, without the line that ends an export: it was cut.")


def _check_header(values: dict[str, Any]) -> None:
    if values.get("format") != FORMAT:
        raise Broken("The file is no export of a session.")
    if values.get("version") != VERSION:
        raise Broken(f"The file has version {values.get('version')!r} of the format, and this release reads {VERSION}.")


def _checked(number: int, kind: str, values: Any) -> dict[str, Any]:
    fields = FIELDS[kind]
    if not isinstance(values, dict) or set(values) != set(fields):
        raise Broken(f"Line {number} of the file has other fields than the {kind} of an export.")
    return {name: _value(number, name, values[name], kinds) for name, kinds in fields.items()}


def _value(number: int, name: str, value: Any, kinds: tuple[type, ...]) -> Any:
    try:
        if datetime in kinds and isinstance(value, str):
            value = datetime.fromisoformat(value)
            if value.utcoffset() is None:
                raise ValueError
            value = value.astimezone(UTC)
            if not EARLIEST <= value < LATEST:
                raise ValueError
        if isinstance(value, bool) != (bool in kinds) or not isinstance(value, kinds):
            raise ValueError
        if isinstance(value, int) and not 0 <= value < NUMBERS:
            raise ValueError
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        if any(not isinstance(text, str) or "\0" in text for text in texts):
            raise ValueError
        for text in texts:
            text.encode()  # which refuses half of a surrogate pair
    except (ValueError, OverflowError):
        raise Broken(f"Line {number} of the file has a {name} that cannot be.") from None
    return value
