"""`mcp-pg-events export` and `import`: a session as JSON Lines. Next: `mcp_pg_events.operator.transfer`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, TextIO

import typer

from ..errors import ConfigurationError
from . import terminal
from .options import Dsn, Json, Schema, SessionId
from .retention import span_option
from .sessions import desk

__all__ = ["export", "import_"]


def export(
    session_id: SessionId,
    dsn: Dsn = None,
    schema: Schema = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write it here, not to stdout; the file must not exist.", show_default=False),
    ] = None,
) -> None:
    """Write a session, with everything that is kept of it, as JSON Lines that `import` takes elsewhere.

    It is a snapshot: what comes later is not in it. End the session here before it is used there.

    Examples:

        mcp-pg-events export 5f0c2a60c9b94d0ab1c7f5a3c2a1b6de --output session.jsonl
    """
    from ..operator import transfer
    from ..operator.text import counted

    done = transfer.Exported()
    with desk(dsn, schema, "export") as opened, _created(output) as file:
        for line in transfer.export(opened, session_id, done):
            file.write(line + "\n")
    print(f"{counted(done.streams, 'stream')} and {counted(done.events, 'event')}.", file=sys.stderr)
    if done.running:
        run, end = ("runs", "it ends") if done.running == 1 else ("run", "they end")
        calls = counted(done.running, "call")
        print(f"{calls} {run}; where this is imported {end} with an error.", file=sys.stderr)


@contextmanager
def _created(path: Path | None) -> Iterator[TextIO]:
    """A new file that only stays when it is whole; stdout without a path."""
    if path is None:
        yield sys.stdout
        return
    try:
        with path.open("x", encoding="ascii") as file:
            try:
                yield file
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ConfigurationError(f"The file {str(path)!r} cannot be written ({error.strerror}).") from None


def import_(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="What `export` wrote; stdin without it.", show_default=False)
    ] = None,
    dsn: Dsn = None,
    schema: Schema = None,
    ttl: Annotated[
        timedelta | None,
        span_option("Count events older than this as expired; give what the retention job is given."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Store a session that `export` wrote, with its ids and their order, so that its client can resume here.

    Nothing is changed where the file was cut, or where one of its ids is taken. It needs the role that owns the tables.

    Examples:

        mcp-pg-events import session.jsonl --dsn postgresql://owner@other.example/app
    """
    from ..operator import transfer
    from ..operator.text import counted

    if file is None and sys.stdin.isatty():
        raise typer.BadParameter("Give a file, or the lines of one on stdin.")
    with desk(dsn, schema, "import") as opened:
        with _opened(file) as lines:
            imported = transfer.import_session(opened, lines, ttl=ttl)
        if as_json:
            print(terminal.as_json(imported))
            return
        print(f"Stored {counted(imported.streams, 'stream')} and {counted(imported.events, 'event')}.")
        if imported.expired:
            print(f"{counted(imported.expired, 'event')} {'counts' if imported.expired == 1 else 'count'} as expired.")
        if imported.partitions:
            print(f"Made {counted(imported.partitions, 'partition')}.")
        if imported.lost:
            have, their = ("has", "its") if imported.lost == 1 else ("have", "their")
            calls = counted(imported.lost, "call")
            print(f"{calls} that ran {have} ended with an error: {their} worker is not here.")
        if imported.ended:
            print("The session lived on one worker, and has ended.")


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdin
        return
    try:
        # What is no text is found line by line.
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            yield file
    except OSError as error:
        raise ConfigurationError(f"The file {str(path)!r} cannot be read ({error.strerror}).") from None
