"""`mcp-pg-events tail SESSION`: a session's messages as they come. Next: `mcp_pg_events.operator.tail`."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import terminal
from .moments import parse_moment
from .options import Dsn, Schema, SessionId
from .sessions import desk

if TYPE_CHECKING:
    from ..operator.tail import Ended, Message, Missing

__all__ = ["tail"]

WIDTH = 200
"""Columns of a line where stdout is no terminal."""
CUT = 4000
"""Characters of a payload that are read to show a part of it."""


def tail(
    session_id: SessionId,
    dsn: Dsn = None,
    schema: Schema = None,
    since: Annotated[
        Any,
        typer.Option(
            metavar="TIME",
            parser=parse_moment,
            help="Begin with what was stored since then: 10m (ago), 2026-11-26T12:00 (UTC). Otherwise all of it.",
            show_default=False,
        ),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Go on until the session ends, or stop with what there is.")
    ] = True,
    full: Annotated[bool, typer.Option("--full", help="Show whole payloads.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON Lines, with whole payloads, and flush each.")
    ] = False,
) -> None:
    """Show the messages of a session, one a line, and go on as they come, whichever worker sends them.

    It only reads: clients keep their streams. It ends with the session; Ctrl-C ends it before.

    Examples:

        mcp-pg-events tail 5f0c2a60c9b94d0ab1c7f5a3c2a1b6de --since 10m

        mcp-pg-events tail 5f0c2a60c9b94d0ab1c7f5a3c2a1b6de --json --no-follow
    """
    from ..operator import tail as tails

    width = shutil.get_terminal_size((WIDTH, 24)).columns if sys.stdout.isatty() else WIDTH
    with desk(dsn, schema, "tail") as opened:
        for each in tails.follow(
            opened,
            session_id,
            since=since,
            forever=follow,
            cut=None if full or as_json else CUT,
            wait=terminal.pause,
        ):
            if as_json:
                print(_as_json(each), flush=True)
            elif isinstance(each, tails.Ended):
                print(_ended(each), file=sys.stderr)
            else:
                print(_line(each, None if full else width), flush=True)


def _ended(ended: Ended) -> str:
    from ..operator.text import plain

    return f"The session ended ({plain(ended.reason)})." if ended.reason else "The session is gone."


def _line(each: Message | Missing, width: int | None) -> str:
    from ..operator.tail import Missing
    from ..operator.text import plain, shortened

    if isinstance(each, Missing):
        which = f"{each.first} to {each.last}" if each.first < each.last else f"{each.first}"
        return f"{'':12} {each.stream}-{which}: no longer kept"
    call = "standalone" if each.standalone else f"{each.method or 'request'} {each.request_id or ''}"
    time = f"{each.created_at.astimezone(UTC):%H:%M:%S.%f}"[:12]
    line = f"{time} {each.stream}-{each.seq:<6} {call:<20} {_summary(each)}"
    return plain(line) if width is None else shortened(line, width)


def _summary(message: Message) -> str:
    """What kind of message it is, and the part of it that says something."""
    try:
        parsed = json.loads(message.payload)
    except ValueError:
        # Cut off, most likely.
        return f"({terminal.size(message.length)}) {message.payload}"
    if not isinstance(parsed, dict):
        return message.payload
    if "method" in parsed:
        kind = f"request {parsed['method']}" if "id" in parsed else str(parsed["method"])
        rest = parsed.get("params", {})
    elif "error" in parsed:
        kind, rest = "error", parsed["error"]
    else:
        kind, rest = "result", parsed.get("result", {})
    return f"{kind} {json.dumps(rest, ensure_ascii=False, separators=(',', ':'))}"


def _as_json(each: Message | Missing | Ended) -> str:
    from ..operator.tail import Ended, Missing

    if isinstance(each, Ended):
        return terminal.as_json({"type": "ended", "reason": each.reason})
    if isinstance(each, Missing):
        return terminal.as_json(
            {"type": "missing", "stream": each.stream, "first_seq": each.first, "last_seq": each.last}
        )
    return terminal.as_json(
        {
            "type": "message",
            "id": f"{each.stream}-{each.seq}",
            "stream": each.stream,
            "seq": each.seq,
            "created_at": each.created_at,
            "request_id": _parsed(each.request_id) if each.request_id is not None else None,
            "method": each.method,
            "final": each.final,
            "message": _parsed(each.payload),
        }
    )


def _parsed(text: str) -> Any:
    """JSON as what it says; as text where there is no JSON for it, such as for a number that is infinite."""
    try:
        parsed = json.loads(text)
        json.dumps(parsed, allow_nan=False)
    except ValueError:
        return text
    return parsed
