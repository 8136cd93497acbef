"""Sessions as an operator meets them: a page of them, everything about one, its end, and the erasure of its payloads.

An end is that of `finish.sql`, so that it is the same as a client's DELETE; the workers are told of it as they tell
each other. Next: `cli/sessions.py` shows what comes back.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal, cast

import psycopg
from psycopg import sql

from ..errors import ConfigurationError, Error
from ..finals import final_error
from ..queries import Queries
from .desk import Desk, checked_id, no_session
from .statements import sessions as statements

__all__ = [
    "Call",
    "Details",
    "Filter",
    "Page",
    "Purged",
    "Session",
    "State",
    "Stream",
    "details",
    "end",
    "page",
    "purge",
]

State = Literal["live", "ended", "all"]

LIMIT: Final = 1000
STREAMS: Final = 20
CALLS: Final = 100
SIZE_PATIENCE: Final = 5.0
"""Seconds that the sizes of a session's payloads may take to add up; they are left out otherwise."""
ERASE_PATIENCE: Final = 600.0
NOBODY: Final = -1
"""The number of no worker: this command's own, so that every worker counts as another one."""
NOTIFICATION: Final = 7000
"""Bytes of a session's id that surely fit into a notification; workers find out about a longer one by polling."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which sessions a page is to have. A time is a moment, or a span before the present of the database."""

    state: State = "live"
    server: str | None = None
    owner: str | None = None
    since: datetime | timedelta | None = None
    until: datetime | timedelta | None = None
    idle: timedelta | None = None
    running: bool = False
    method: str | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """One line of a list. `idle` is in seconds; `calls` run, and so many `readers` are attached."""

    id: str
    server: str
    owner: str | None
    worker: int | None
    protocol_version: str | None
    created_at: datetime
    seen_at: datetime
    idle: float
    ended_at: datetime | None
    ended_reason: str | None
    calls: int
    readers: int


@dataclass(frozen=True, slots=True)
class Page:
    """Sessions, the newest first. `next` is what `after` takes for those that follow; None at the end."""

    sessions: list[Session]
    next: str | None


@dataclass(frozen=True, slots=True)
class Stream:
    """One stream: a call's, or the standalone one. `last_seq` is its last number, of which `floor` have left."""

    number: int
    request_id: str | None
    method: str | None
    standalone: bool
    created_at: datetime
    ended_at: datetime | None
    last_seq: int
    floor: int
    final_seq: int | None
    worker: int | None
    reader: int | None


@dataclass(frozen=True, slots=True)
class Call:
    """A call that runs: whose worker holds its lock is `alive`."""

    stream: int
    request_id: str | None
    method: str | None
    created_at: datetime
    events: int
    worker: int | None
    host: str | None
    pid: int | None
    alive: bool
    reader: int | None


@dataclass(frozen=True, slots=True)
class Details:
    """Everything about one session but its payloads.

    `newest_streams` and `running` are cut to twenty and a hundred. `events` and `bytes` are those that are kept; None
    where adding them up takes too long. `proxied`: what its client says of itself is its upstream's to know, and is not
    recorded.
    """

    id: str
    server: str
    owner: str | None
    client: str | None
    protocol_version: str | None
    log_level: str | None
    subscriptions: int
    proxied: bool
    worker: int | None
    created_at: datetime
    seen_at: datetime
    idle: float
    ended_at: datetime | None
    ended_reason: str | None
    streams: int
    calls: int
    readers: int
    events: int | None
    bytes: int | None
    running: list[Call]
    newest_streams: list[Stream]


@dataclass(frozen=True, slots=True)
class Purged:
    """What was erased. `ended`: the session lived until then."""

    ended: bool
    calls: int
    events: int
    bytes: int


# --- looking ----------------------------------------------------------------------------------------------------------


def page(desk: Desk, wanted: Filter, *, limit: int = 50, after: str | None = None) -> Page:
    """The newest sessions that `wanted` lets through, or those after a place that an earlier page named.

    Raises:
        ConfigurationError: `after` is nothing that a page named.
    """
    statement, values = listing(desk, wanted, limit=limit, after=after)
    rows = desk.look(statement, values)
    sessions = [_session(row) for row in rows[:limit]]
    return Page(sessions, _place(sessions[-1]) if len(rows) > limit else None)


def listing(desk: Desk, wanted: Filter, *, limit: int, after: str | None = None) -> tuple[sql.Composed, dict[str, Any]]:
    """The statement of a page and its values; it gives one row more, if there is one."""
    values: dict[str, Any] = {"limit": limit + 1}
    names: list[str] = [] if wanted.state == "all" or wanted.idle is not None else [wanted.state]
    for name in ("server", "owner", "since", "until", "idle", "method"):
        if (value := getattr(wanted, name)) is not None:
            names.append(f"{name}_ago" if name in ("since", "until") and isinstance(value, timedelta) else name)
            values[name] = value
    if wanted.running and wanted.method is None:
        names.append("running")
    if after is not None:
        names.append("after")
        values["after_created"], values["after_id"] = _parse_place(after)
    where = sql.SQL(" AND ").join(sql.SQL(statements.CONDITIONS[name]).format(s=desk.name) for name in names)
    statement = sql.SQL(statements.SESSIONS).format(s=desk.name, where=where if names else sql.SQL("true"))
    return statement, values


def _session(row: dict[str, Any]) -> Session:
    return Session(**{**row, "idle": max(row["idle"].total_seconds(), 0.0)})


def _place(session: Session) -> str:
    plain = json.dumps([session.created_at.isoformat(), session.id])
    return base64.urlsafe_b64encode(plain.encode()).decode().rstrip("=")


def _parse_place(text: str) -> tuple[datetime, str]:
    try:
        plain = json.loads(base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4)))
        created, session_id = plain
        moment = datetime.fromisoformat(created)
        if moment.utcoffset() is None or not isinstance(session_id, str) or "\0" in session_id:
            raise ValueError
    except (ValueError, TypeError):
        raise ConfigurationError("--after takes what an earlier page of this list ended with.") from None
    return moment, session_id


def details(desk: Desk, session_id: str) -> Details:
    """Everything about one session.

    Raises:
        Error: there is none.
    """
    asked = {"session": checked_id(desk, session_id)}
    rows = desk.look(statements.SESSION, asked)
    if not rows:
        raise no_session(desk, session_id)
    [session] = rows
    [counts] = desk.look(statements.STREAM_COUNTS, asked)
    asked["bound"] = (counts["oldest"] or session["created_at"]) - timedelta(minutes=10)
    running = desk.look(statements.CALLS_OF_SESSION, {**asked, "limit": CALLS})
    streams = desk.look(statements.STREAMS_OF_SESSION, {**asked, "limit": STREAMS})
    events = size = None
    try:
        [sizes] = desk.look(statements.SIZE_OF_SESSION, asked, patience=SIZE_PATIENCE)
        events, size = sizes["events"], sizes["bytes"]
    except psycopg.errors.QueryCanceled:
        pass
    same = ("id", "server", "owner", "protocol_version", "log_level", "worker", "created_at", "seen_at", "ended_at")
    return Details(
        **{name: session[name] for name in (*same, "ended_reason")},
        client=_client(session["initialize"]),
        subscriptions=session["subscribed"],
        proxied=session["upstream"] is not None,
        idle=max(session["idle"].total_seconds(), 0.0),
        streams=counts["streams"],
        calls=counts["calls"],
        readers=counts["readers"],
        events=events,
        bytes=size,
        running=[_call(row) for row in running],
        newest_streams=[_stream(row) for row in streams],
    )


def _client(initialize: str | None) -> str | None:
    """The client's name and version, as its `initialize` gave them."""
    try:
        info = json.loads(initialize or "null")["clientInfo"]
        return f"{info['name']} {info['version']}"
    except (ValueError, TypeError, KeyError):
        return None


def _call(row: dict[str, Any]) -> Call:
    return Call(
        row["number"],
        row["request_id"],
        row["method"],
        row["created_at"],
        row["last_seq"],
        row["worker"],
        row["worker_host"],
        row["worker_pid"],
        bool(row["worker_alive"]),
        row["reader_worker"],
    )


def _stream(row: dict[str, Any]) -> Stream:
    same = ("number", "request_id", "method", "standalone", "created_at", "ended_at", "last_seq", "floor", "final_seq")
    reader = row["reader_worker"] if row["final_seq"] is None else None
    return Stream(**{name: row[name] for name in (*same, "worker")}, reader=reader)


# --- ending -----------------------------------------------------------------------------------------------------------


def end(desk: Desk, session_id: str) -> int | None:
    """End a session everywhere, as its client's DELETE would; how many running calls ended with it.

    None where it had ended already. Its calls get their final before this returns; live workers are told, cancel what
    runs, and answer 404.

    Raises:
        Error: there is no such session.
    """
    asked = {"session": checked_id(desk, session_id), "reason": "deleted", "error": _error()}
    with desk.transaction(writes=True):
        rows = desk.run(statements.END_SESSION, asked)
    if not rows:
        raise no_session(desk, session_id)
    finished = cast("list[int] | None", rows[0]["streams"])
    if finished is None:
        return None
    _announce(desk, session_id, finished)
    return int(rows[0]["calls"])


def _error() -> str:
    return json.dumps(final_error("session_ended"), separators=(",", ":"))


def _announce(desk: Desk, session_id: str, finished: list[int]) -> None:
    """Wake the readers of streams that ended, and tell every worker that the session did."""
    queries = Queries(desk.schema)
    row = desk.connection.execute(
        "SELECT relnamespace::bigint AS oid FROM pg_class WHERE oid = %s::regclass",
        [sql.Identifier(desk.schema, "workers").as_string()],
    ).fetchone()
    assert row is not None
    told = {"me": NOBODY, "prefix": f"mcp_pg_events_{row['oid']}_"}
    with desk.connection.transaction():
        desk.connection.execute(queries.wake, told | {"streams": finished})
    if len(session_id.encode()) <= NOTIFICATION:
        desk.connection.execute(queries.tell_others, told | {"payload": f"e{session_id}"})


# --- erasing ----------------------------------------------------------------------------------------------------------


def purge(desk: Desk, session_id: str, *, end_first: bool) -> Purged:
    """Erase the payloads of a session: its events, its letters, and what its client said of itself.

    What stays are the rows of the session, ended, and of its streams, with their floors raised over what went: no
    number is given again, and who asks is told that it has expired. It is the one exception to events being
    append-only, and needs the rights of the tables' owner.

    Raises:
        Error: there is no such session; it lives, and `end_first` is False; or something goes on writing into it.
    """
    ended = False
    calls = 0
    asked: dict[str, Any] = {"session": checked_id(desk, session_id), "error": _error()}
    rows = desk.look(statements.SESSION, asked)
    if not rows:
        raise no_session(desk, session_id)
    if rows[0]["ended_at"] is None:
        if not end_first:
            raise Error(
                "The session lives; end it first with `mcp-pg-events sessions end`, or confirm that it is ended."
            )
        # In a transaction of its own: it holds up the workers of its calls, and erasing may take long.
        calls = end(desk, session_id) or 0
        ended = True
    # What is wired by hand writes into streams by name, and does not ask whether the session has ended.
    with desk.transaction(writes=True):
        left = [row["stream"] for row in desk.run(statements.OPEN_CALLS_OF_SESSION, asked)]
        left += [row["stream"] for row in desk.run(statements.CLOSE_STANDALONE, asked)]
    if left:
        _announce(desk, session_id, left)
    with desk.transaction(writes=True, patience=ERASE_PATIENCE):
        [locked] = desk.run(statements.LOCK_SESSION, asked)
        if locked["ended_at"] is None:
            raise Error("The session was opened again meanwhile; run this again.")
        streams = [row["stream"] for row in desk.run(statements.RAISE_FLOORS, asked)]
        [erased] = desk.run(statements.ERASE_EVENTS, {"streams": streams})
        desk.run(statements.ERASE_INBOX, asked)
        desk.run(statements.ERASE_SESSION, asked)
        if desk.run(statements.STREAM_COUNTS, asked)[0]["calls"]:
            raise Error("Something goes on writing into the session by `for_session`; stop it, and run this again.")
    return Purged(ended, calls, erased["events"], erased["bytes"])
