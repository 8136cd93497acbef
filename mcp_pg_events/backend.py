"""What the session side (`http`, `session`, `reader`) needs of a log, in types that know no database; and what `http`
needs of those who run a session's requests.

`log.py` has the log over PostgreSQL; another one could stand in its place. `sessions.py` runs requests in the SDK's
dispatcher, `proxy/` in programs that cannot be changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from mcp_types import JSONRPCMessage, JSONRPCRequest
from starlette.requests import Request

__all__ = [
    "App",
    "Attachment",
    "Call",
    "CursorRejected",
    "Event",
    "EventLog",
    "OpenedSession",
    "Page",
    "RequestInFlight",
    "Runner",
    "Runners",
    "SessionKey",
    "SessionLimit",
    "SessionRecord",
    "SessionUnknown",
    "Stream",
]


class SessionUnknown(Exception):
    """No such session for this asker: unknown, ended, expired and foreign look alike."""


class SessionLimit(Exception):
    """As many sessions are open as the server allows; the text says how many."""


class RequestInFlight(Exception):
    """The session has a running request with this id; `stream` is its stream, where another worker runs it."""

    def __init__(self, stream: int | None = None) -> None:
        super().__init__(stream)
        self.stream = stream


class CursorRejected(Exception):
    """A `Last-Event-ID` that cannot be resumed from; `reason` is `unknown` or `expired`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class SessionKey:
    """Who asks for which session: its id, the server that it belongs to, the principal (or None), the idle time-out in
    seconds."""

    session_id: str
    server: str
    owner: str | None
    idle_timeout: float | None

    @property
    def touch_interval(self) -> float:
        """How old (seconds) the session's last stamp may be before a request renews it."""
        return min(30.0, self.idle_timeout / 8) if self.idle_timeout else 30.0


@dataclass(slots=True, eq=False)
class Stream:
    """A stream that this worker writes to. `shared` ones get their numbers in the database, since others write too."""

    number: int
    session_id: str
    created_at: datetime | None = None
    request_key: str | None = None
    shared: bool = False
    next_seq: int = 1
    stored: int = 0
    """The last number that was acknowledged."""
    closed: bool = False
    """Its final is on its way or stored: nothing more is taken."""
    ended: bool = False
    """Somebody else wrote its final: what still waits to be stored is refused."""
    read_elsewhere: bool = False
    """Its reader may be on another worker, which is to be woken after each commit."""
    reader_generation: int = 1
    """The newest reader that this worker knows of."""
    on_ended: Callable[[], None] | None = field(default=None, repr=False)
    """Called when somebody else wrote the final: the session ended, or this worker was declared dead."""


@dataclass(frozen=True, slots=True)
class Event:
    """One stored event. `payload` is the JSON-RPC message in UTF-8; `final` says that the stream ends with it."""

    seq: int
    payload: bytes
    final: bool
    created_at: datetime
    since: float = 0.0
    """When (loop time) the first of its batch was appended; what comes out of the log is compared by its clock."""


@dataclass(frozen=True, slots=True)
class Page:
    """What follows in a stream: events in order, whether its end is reached with them, and who its newest reader is."""

    events: Sequence[Event]
    ended: bool
    generation: int
    expired: bool
    """The next event is gone with its partition, so there is a gap after the position asked for."""
    more: bool = False
    """The page is full, so there may be another one."""


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """What `initialize` and what followed it left behind: all that another worker needs to serve the session."""

    initialize: str
    protocol_version: str
    log_level: str | None
    subscriptions: Sequence[str]
    standalone: int
    told: int
    """How often its client has changed any of this."""


@dataclass(frozen=True, slots=True, eq=False)
class App:
    """What an app's sessions do with what other workers send."""

    receive: Callable[[str, str, Stream | None], bool]
    """Session, message, and the stream of a request: another worker opened it, and its events are appended here."""
    session_ended: Callable[[str], None]
    session_changed: Callable[[str], None]
    end_all: Callable[[], None]
    drain: Callable[[], None] = lambda: None
    """This worker is on its way out; calls may still finish."""
    sessions: Callable[[], int] = lambda: 0
    """How many sessions have an object here."""


@dataclass(frozen=True, slots=True)
class OpenedSession:
    """A new session: its standalone stream's number, and the stream of its `initialize` request."""

    standalone: int
    stream: Stream


@dataclass(frozen=True, slots=True)
class Call:
    """A request that has its stream. `record` is there when the asker wanted to restore the session."""

    stream: Stream
    protocol_version: str
    told: int
    record: SessionRecord | None
    elsewhere: bool = False
    """Another worker runs it, and is told: its events come as they do to any reader that attached late."""
    letters: bool = False
    """Something for the session that is older than the request waits in this worker's inbox."""


@dataclass(frozen=True, slots=True)
class Attachment:
    """A reader's hold on a stream: newest generation, position, and the bound for reading on from there."""

    stream: int
    generation: int
    position: int
    bound: datetime
    standalone: bool
    protocol_version: str
    complete: bool
    """The final is behind the position: nothing will ever follow."""


class EventLog(Protocol):
    """The log as the session side sees it. Every method may raise `errors.DatabaseUnavailable`."""

    async def open_session(
        self,
        key: SessionKey,
        *,
        initialize: str,
        protocol_version: str,
        request_id: str,
        request_key: str,
        limit: int | None,
        bound: bool = False,
        upstream: str | None = None,
    ) -> OpenedSession:
        """Record a session; `bound` to this worker, it ends with it. `upstream` is the upstream's id of a proxied one.
        Raises `SessionLimit` when the server has `limit` live ones."""
        ...

    async def renew_session(self, session_id: str, initialize: str, protocol_version: str) -> int: ...

    async def find_session(self, key: SessionKey) -> SessionRecord:
        """Raises `SessionUnknown`."""
        ...

    async def open_stream(
        self, key: SessionKey, *, request_id: str, request_key: str, method: str, restore: bool
    ) -> Call:
        """Raises `SessionUnknown` and `RequestInFlight`."""
        ...

    async def abandoned(self, stream: int) -> bool:
        """Whether the worker that runs a stream's call seems to be gone."""
        ...

    async def append(self, stream: Stream, payload: bytes, *, final: bool = False) -> int:
        """Store one event, and its number once it is committed. Raises `errors.AppendRefused` on a closed stream."""
        ...

    async def attach(self, key: SessionKey, stream: int | None, after: int | None, *, patience: float) -> Attachment:
        """Become the reader of a stream (None: the standalone one) after a position (None: what nobody was handed yet).

        Raises `SessionUnknown` and `CursorRejected`."""
        ...

    async def detach(self, stream: int, generation: int, position: int) -> None: ...

    async def read(self, stream: int, after: int, bound: datetime) -> Page:
        """The next page of a stream; empty when there is nothing yet."""
        ...

    def bound_of(self, stream: Stream) -> datetime:
        """The bound for reading a stream that has just been opened from its beginning."""
        ...

    def bound_after(self, event: Event) -> datetime:
        """The bound for reading what follows `event`."""
        ...

    async def close_reader(self, stream: int) -> None:
        """End the response that reads a stream, on whichever worker it is (SEP-1699)."""
        ...

    async def record_log_level(self, session_id: str, level: str) -> int:
        """Remember it, and tell the other workers; how often the session was changed by now. 0: it was not."""
        ...

    async def record_subscription(self, session_id: str, uri: str, subscribed: bool) -> int: ...

    async def call_owner(self, session_id: str, request_key: str) -> int | None:
        """The worker that runs a request of the session, None when none does."""
        ...

    async def session_workers(self, session_id: str) -> list[int]:
        """The workers that run something for the session."""
        ...

    async def post(self, workers: list[int], session_id: str, payload: str) -> int:
        """Put a message into the workers' inboxes, durably, and announce it; how many of them live."""
        ...

    async def end_session(self, key: SessionKey, reason: str) -> None:
        """End a session everywhere. Raises `SessionUnknown`."""
        ...


class Runner(Protocol):
    """One session that is about to begin here."""

    standalone: Stream | None

    async def initialize(self, message: JSONRPCRequest, body: bytes, request: Request) -> list[JSONRPCMessage]:
        """Run the session's first request: what was sent before its answer, and the answer. Empty: it was cut short."""
        ...


class Runners(Protocol):
    """The sessions of one endpoint on this worker. `body` is the message as its client wrote it."""

    bound: bool
    """Whether a session lives on one worker, and ends with it."""

    def open(self, key: SessionKey) -> Runner:
        """A new session. Raises `SessionLimit`."""
        ...

    async def open_stream(self, key: SessionKey, message: JSONRPCRequest, body: bytes) -> Call:
        """See `EventLog.open_stream`."""
        ...

    async def start(self, key: SessionKey, call: Call, message: JSONRPCRequest, body: bytes, request: Request) -> None:
        """Run a request whose stream is open. It goes on whatever becomes of the HTTP request."""
        ...

    async def route(self, key: SessionKey, message: JSONRPCMessage, body: bytes, request: Request) -> None:
        """Bring a message that is no request to where it concerns something. Raises `SessionUnknown`."""
        ...

    def session_ended(self, session_id: str) -> None:
        """A session ended, here or elsewhere."""
        ...
