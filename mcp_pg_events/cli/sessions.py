"""`mcp-pg-events sessions`: list, show, end and purge. Next: `mcp_pg_events.operator.sessions`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..settings import Settings
from . import terminal
from .moments import parse_moment
from .options import Dsn, Json, Schema, SessionId
from .retention import parse_duration

if TYPE_CHECKING:
    from ..operator.desk import Desk
    from ..operator.sessions import Details, Session

__all__ = ["app", "desk"]

app = typer.Typer(no_args_is_help=True, help="List sessions, look at one, end one, or erase its payloads.")

OWNER = 40
"""Characters of an owner in a list; `show` and `--json` have all of it."""


@contextmanager
def desk(dsn: str | None, schema: str | None, work: str) -> Iterator[Desk]:
    """The database of an operator's command, whose output may be piped."""
    from .. import migrate
    from ..operator.desk import open_desk

    settings = Settings.given(dsn=dsn, schema=schema)
    with terminal.output(), open_desk(migrate.require_dsn(settings.database), settings.schema_name, work) as opened:
        yield opened


def _owner(text: str | None) -> str | None:
    """An owner as the table has it: JSON. A plain name, which `owner=` of `durable` gave, is made so."""
    if text is None:
        return None
    try:
        given = isinstance(json.loads(text), str | list)
    except ValueError:
        given = False
    return text if given else json.dumps(text)


@app.command("list")
def list_sessions(
    dsn: Dsn = None,
    schema: Schema = None,
    state: Annotated[Literal["live", "ended", "all"], typer.Option(help="Which sessions.")] = "live",
    server: Annotated[
        str | None, typer.Option(metavar="NAME", help="Only sessions of this server.", show_default=False)
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER",
            help="Only sessions of this principal, as `sessions show` gives it, or as `owner=` gave it to durable().",
            show_default=False,
        ),
    ] = None,
    since: Annotated[
        Any,
        typer.Option(
            metavar="TIME",
            parser=parse_moment,
            help="Only sessions opened since then: 2h (ago), 2026-11-26T12:00 (UTC).",
            show_default=False,
        ),
    ] = None,
    until: Annotated[
        Any,
        typer.Option(metavar="TIME", parser=parse_moment, help="Only sessions opened before then.", show_default=False),
    ] = None,
    idle: Annotated[
        timedelta | None,
        typer.Option(
            metavar="SPAN",
            parser=parse_duration,
            help="Only live sessions that nobody has used for so long: 30m, 12h.",
            show_default=False,
        ),
    ] = None,
    running: Annotated[bool, typer.Option("--running", help="Only sessions in which a call runs.")] = False,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD", help="Only sessions in which a call of this method runs: tools/call.", show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 50,
    after: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help="Go on where an earlier page said that it ended.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """List sessions, the newest first.

    Where there are more than --limit, the last line names the place that --after goes on from.

    Examples:

        mcp-pg-events sessions list --server weather --running

        mcp-pg-events sessions list --state all --since 2h --json
    """
    from ..operator import sessions

    if idle is not None and state == "ended":
        raise typer.BadParameter("--idle is about live sessions, not about those that have ended.")
    wanted = sessions.Filter(
        state=state,
        server=server,
        owner=_owner(owner),
        since=since,
        until=until,
        idle=idle,
        running=running,
        method=method,
    )
    with desk(dsn, schema, "sessions list") as opened:
        page = sessions.page(opened, wanted, limit=limit, after=after)
        if as_json:
            print(terminal.as_json(page))
            return
        if not page.sessions:
            print("There are no such sessions." if state != "live" else "There are no such live sessions.")
            return
        head = ("SESSION", "SERVER", "OWNER", "OPENED (UTC)", "STATE", "CALLS", "READERS")
        print(terminal.table(head, [_row(session) for session in page.sessions]))
        if page.next is not None:
            print(f"There are more: --after {page.next}")


def _row(session: Session) -> list[str]:
    from ..operator.text import plain, shortened

    return [
        plain(session.id),
        shortened(session.server, OWNER),
        shortened(session.owner or "", OWNER),
        terminal.moment(session.created_at),
        _state(session),
        str(session.calls),
        str(session.readers),
    ]


def _state(session: Session | Details) -> str:
    from ..operator.text import plain

    if session.ended_at is not None:
        return plain(f"ended ({session.ended_reason})")
    return f"live, idle {terminal.age(session.idle)}"


@app.command()
def show(session_id: SessionId, dsn: Dsn = None, schema: Schema = None, as_json: Json = False) -> None:
    """Show everything about one session but its payloads: its calls, their workers, readers, streams and sizes."""
    from ..operator import sessions

    with desk(dsn, schema, "sessions show") as opened:
        found = sessions.details(opened, session_id)
        print(terminal.as_json(found) if as_json else "\n".join(_facts(found)))


def _facts(found: Details) -> Iterator[str]:
    from ..operator.text import counted, plain, shortened

    kept = "not added up within 5 s"
    if found.events is not None and found.bytes is not None:
        kept = f"{found.events:,} kept, {terminal.size(found.bytes)}"
    # The proxy before an HTTP server keeps nothing of what that keeps itself.
    unrecorded = "not recorded (proxied)" if found.proxied else None
    facts = {
        "session": plain(found.id),
        "server": plain(found.server),
        "owner": plain(found.owner) if found.owner is not None else "none",
        "client": shortened(found.client, 200) if found.client is not None else unrecorded or "unknown",
        "protocol": plain(found.protocol_version or "unknown"),
        "log level": plain(found.log_level or unrecorded or "not set"),
        "subscriptions": unrecorded or str(found.subscriptions),
        "state": _state(found),
        "opened": f"{terminal.moment(found.created_at)} UTC",
        "last used": f"{terminal.moment(found.seen_at)} UTC",
    }
    if found.ended_at is not None:
        facts["ended"] = f"{terminal.moment(found.ended_at)} UTC"
    if found.worker is not None:
        facts["lives on"] = f"worker {found.worker}"
    facts |= {"streams": f"{found.streams:,}", "events": kept}
    facts |= {"running calls": str(found.calls), "readers": str(found.readers)}
    for name, value in facts.items():
        yield f"{name:<14} {value}"
    if found.running:
        yield "\n" + terminal.table(
            ("RUNNING", "REQUEST", "METHOD", "SINCE (UTC)", "EVENTS", "WORKER", "READER"),
            [
                [
                    str(call.stream),
                    plain(call.request_id or ""),
                    plain(call.method or ""),
                    terminal.moment(call.created_at),
                    str(call.events),
                    _worker(call.worker, call.host, call.pid, call.alive),
                    f"worker {call.reader}" if call.reader is not None else "nobody",
                ]
                for call in found.running
            ],
        )
    if found.newest_streams:
        yield "\n" + terminal.table(
            ("STREAM", "REQUEST", "METHOD", "OPENED (UTC)", "EVENTS", "GONE", "STATE", "READER"),
            [
                [
                    str(stream.number),
                    plain(stream.request_id or ""),
                    "standalone" if stream.standalone else plain(stream.method or ""),
                    terminal.moment(stream.created_at),
                    str(stream.last_seq),
                    str(stream.floor),
                    "open" if stream.final_seq is None else "ended",
                    f"worker {stream.reader}" if stream.reader is not None else "",
                ]
                for stream in found.newest_streams
            ],
        )
    if found.streams > len(found.newest_streams):
        yield f"... and {counted(found.streams - len(found.newest_streams), 'older stream')}"


def _worker(number: int | None, host: str | None, pid: int | None, alive: bool) -> str:
    from ..operator.text import plain

    if number is None:
        return "any"
    where = f" ({plain(host)}, pid {pid})" if host is not None else ""
    return f"{number}{where}" + ("" if alive else ", lost")


@app.command()
def end(session_id: SessionId, dsn: Dsn = None, schema: Schema = None, as_json: Json = False) -> None:
    """End a session everywhere, as a DELETE of its client's would.

    Its running calls get their final, an error, and are cancelled; every worker answers 404 from then on.
    """
    from ..operator import sessions
    from ..operator.text import counted

    with desk(dsn, schema, "sessions end") as opened:
        calls = sessions.end(opened, session_id)
        if as_json:
            print(terminal.as_json({"ended": calls is not None, "calls": calls or 0}))
        elif calls is None:
            print("It had ended already.")
        else:
            print(f"Ended, and {counted(calls, 'running call')} with it.")


@app.command()
def purge(
    session_id: SessionId,
    dsn: Dsn = None,
    schema: Schema = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, and end the session if it lives.")] = False,
    as_json: Json = False,
) -> None:
    """Erase the payloads of one session for good: its events, and what its client said of itself.

    A session that lives is ended first. It asks, unless --yes is given. It needs the role that owns the tables.
    """
    from ..operator import sessions
    from ..operator.text import counted

    with desk(dsn, schema, "sessions purge") as opened:
        if not yes:
            found = sessions.details(opened, session_id)
            if not sys.stdin.isatty():
                raise typer.BadParameter("Nobody can be asked here, since stdin is no terminal: add --yes.")
            print("\n".join(_facts(found)), file=sys.stderr)
            lives = " It lives, and is ended first." if found.ended_at is None else ""
            typer.confirm(f"Erase the payloads of this session?{lives}", abort=True, err=True)
        purged = sessions.purge(opened, session_id, end_first=True)
        if as_json:
            print(terminal.as_json(purged))
            return
        if purged.ended:
            print(f"Ended, and {counted(purged.calls, 'running call')} with it.")
        print(f"Erased {counted(purged.events, 'event')}, {terminal.size(purged.bytes)}.")
