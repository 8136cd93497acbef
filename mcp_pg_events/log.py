"""The log over PostgreSQL: sessions, streams and their readers; what is appended goes through `writer.py`.

Reads that touch events are never prepared with their bound as a parameter: such a plan locks and probes every partition
(PostgreSQL manual, "Partition Pruning"). Next: `hub.py` and `reader.py` for what was stored.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Final

from psycopg.rows import TupleRow

from .admission import Admission
from .appends import MARGIN, Identity
from .arrays import Int8Array, TextArray
from .attachments import Attachments
from .backend import (
    Attachment,
    Call,
    CursorRejected,
    Event,
    OpenedSession,
    Page,
    RequestInFlight,
    SessionKey,
    SessionRecord,
    SessionUnknown,
    Stream,
)
from .database import Database
from .errors import ConfigurationError, DatabaseUnavailable
from .fetcher import Fetcher
from .finish import Finisher
from .hub import Hub
from .opener import Opener
from .queries import Queries, asking
from .writer import Writer

__all__ = ["Log"]

logger = logging.getLogger(__name__)

SUBSCRIPTIONS: Final = 1000
URI_LENGTH: Final = 4096
"""How many subscriptions, and of what length, a session has remembered for it; each restoring replays them all."""

_BIGINT: Final = 2**63
_BEGINNING: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Log:
    """`backend.EventLog` for one store. It holds no connection of its own."""

    def __init__(
        self,
        database: Database,
        queries: Queries,
        identity: Identity,
        writer: Writer,
        opener: Opener,
        fetcher: Fetcher,
        finisher: Finisher,
        hub: Hub,
        channel_prefix: str,
    ) -> None:
        self._database = database
        self._queries = queries
        self._writer = writer
        self._opener = opener
        self._fetcher = fetcher
        self._finisher = finisher
        self._hub = hub
        self._prefix = channel_prefix
        self._attachments = Attachments(database, queries, identity, writer, channel_prefix)
        self._admission = Admission(database, queries)
        self._identity = identity
        self._opening: set[tuple[str, str | None, str]] = set()

    # --- sessions -----------------------------------------------------------------------------------------------------

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
        """Record a session, its standalone stream and the stream of its `initialize`, in one transaction.

        Raises:
            SessionLimit: the server has `limit` live sessions.
            DatabaseUnavailable: it could not be recorded, so the session does not exist.
        """
        parameters = asking(key) | {
            "initialize": initialize,
            "protocol_version": protocol_version,
            "request_id": request_id,
            "request_key": request_key,
            "me": self._identity.number,
            "bound": bound,
            "upstream": upstream,
        }
        row = await self._admission.open(parameters, limit)
        if row is None:
            raise self._gone(parameters["me"])
        standalone, number, created_at, epoch = row
        return OpenedSession(
            standalone, self.own(parameters["me"], epoch, number, key.session_id, created_at, request_key)
        )

    async def renew_session(self, session_id: str, initialize: str, protocol_version: str) -> int:
        return await self._change(
            self._queries.renew_session,
            {"session": session_id, "initialize": initialize, "protocol_version": protocol_version},
        )

    async def _change(self, statement: bytes, parameters: dict[str, Any]) -> int:
        """Remember what a client told its session, and tell the other workers; 0 where there is nothing to change."""
        rows = await self._database.fetch(statement, parameters)
        if not rows:
            return 0
        await self._database.fetch(
            self._queries.tell_others,
            {"me": self._identity.number, "prefix": self._prefix, "payload": f"u{parameters['session']}"},
        )
        told: int = rows[0][0]
        return told

    async def find_session(self, key: SessionKey) -> SessionRecord:
        """What another worker needs to serve the session.

        Raises:
            SessionUnknown: it is none of the asker's, or none that lives.
        """
        rows = await self._database.fetch(self._queries.find_session, asking(key))
        if not rows:
            raise SessionUnknown
        record = _record(rows[0])
        if record is None:
            raise SessionUnknown
        return record

    async def session_record(self, session_id: str) -> SessionRecord | None:
        """What a session is now, for a worker that knows it already; None when it has ended."""
        rows = await self._database.fetch(self._queries.session_record, {"session": session_id})
        return _record(rows[0]) if rows else None

    async def record_log_level(self, session_id: str, level: str) -> int:
        return await self._change(self._queries.set_log_level, {"session": session_id, "level": level})

    async def record_subscription(self, session_id: str, uri: str, subscribed: bool) -> int:
        # As JSON, since PostgreSQL's text takes no U+0000.
        parameters = {"session": session_id, "uri": json.dumps(uri), "limit": SUBSCRIPTIONS}
        if not subscribed:
            return await self._change(self._queries.unsubscribe, parameters)
        told = await self._change(self._queries.subscribe, parameters) if len(uri) <= URI_LENGTH else 0
        if not told:
            logger.warning("Session %s: a subscription is not remembered, so it will not follow to others", session_id)
        return told

    async def gone_sessions(self, sessions: set[str]) -> list[str]:
        """Those of `sessions` that have ended."""
        rows = await self._database.fetch(
            self._queries.gone_sessions, {"sessions": TextArray(session.encode() for session in sessions)}
        )
        return [session_id for (session_id,) in rows]

    async def end_session(self, key: SessionKey, reason: str) -> None:
        """End a session everywhere: 404 from now on, finals for its calls, its owners and readers told.

        Raises:
            SessionUnknown: there is none to end.
        """
        if not await self._finisher.end_session(asking(key) | {"reason": reason}):
            raise SessionUnknown

    # --- streams ------------------------------------------------------------------------------------------------------

    async def open_stream(
        self,
        key: SessionKey,
        *,
        request_id: str,
        request_key: str,
        method: str,
        restore: bool,
        elsewhere: bool = False,
    ) -> Call:
        """Open the stream of a request that has just arrived, with its reader here. `elsewhere` says that another
        process does what it asks for.

        Raises:
            SessionUnknown: no such session for this asker.
            RequestInFlight: a request with this id is running in the session, on whichever worker.
        """
        method = method.replace("\0", "")[:200]
        running = self._writer.calls.running(key.session_id, request_key)
        with self.opening(key, request_key):
            opened = None if restore else await self._opener.open(key, request_id, request_key, method, elsewhere)
            if opened is not None:
                stream = self.own(
                    opened.worker, opened.epoch, opened.number, key.session_id, opened.created_at, request_key
                )
                return Call(stream, opened.protocol_version, opened.told, None)
            me = self._identity.number
            rows = await self._database.fetch(
                self._queries.open_stream,
                asking(key)
                | {
                    "request_id": request_id,
                    "request_key": request_key,
                    "method": method,
                    "me": me,
                    "restore": restore,
                },
            )
            if not rows:
                raise SessionUnknown
            epoch, number, created_at, busy, busy_worker, busy_created_at, protocol_version, told, *record = rows[0]
            if epoch is None:
                raise self._gone(me)
            if number is None:
                if busy is None or busy_worker != me or busy == running or self._writer.calls.owns(busy):
                    raise RequestInFlight(busy if busy_worker != me else None)
                # This worker's, it runs nothing under the id, and nobody else here opens it: the statement ran twice,
                # since its first answer was lost.
                number, created_at = busy, busy_created_at
            stream = self.own(me, epoch, number, key.session_id, created_at, request_key)
        restored = _record((record[0], protocol_version, *record[1:], told)) if restore else None
        if protocol_version is None or (restore and restored is None):
            raise SessionUnknown
        return Call(stream, protocol_version, told, restored)

    @contextmanager
    def opening(self, key: SessionKey, request_key: str) -> Iterator[None]:
        """While a request's stream is being opened here. Raises `RequestInFlight` when one with its id already is."""
        # With the owner, so that a stranger's request is in nobody's way.
        opening = (key.session_id, key.owner, request_key)
        if opening in self._opening:
            raise RequestInFlight
        self._opening.add(opening)
        try:
            yield
        finally:
            self._opening.discard(opening)

    def check_identity(self, worker: int) -> None:
        """See `Writer.check_identity`."""
        self._writer.check_identity(worker)

    async def abandoned(self, stream: int) -> bool:
        """Whether the worker of a stream's call has lost its lock, or has been ended."""
        rows = await self._database.fetch(self._queries.abandoned, {"stream": stream})
        return bool(rows and rows[0][0])

    def runs(self, stream: int) -> bool:
        """Whether the call that `stream` belongs to runs here."""
        return self._writer.calls.owns(stream)

    def own(
        self, worker: int, epoch: int, number: int, session_id: str, created_at: datetime, request_key: str | None
    ) -> Stream:
        """The stream that was opened for this worker to write to. Raises DatabaseUnavailable when it was declared dead
        since, so that another worker ends the stream, or has."""
        self.check_identity(worker)
        stream = Stream(number, session_id, created_at, request_key)
        self._writer.opened(stream, epoch)
        return stream

    def _gone(self, worker: int) -> DatabaseUnavailable:
        if worker == self._identity.number:
            self._writer.declared_dead()
        return DatabaseUnavailable(
            "This worker was declared dead and takes a new number; the request may be sent again"
        )

    def append(self, stream: Stream, payload: bytes, *, final: bool = False) -> Coroutine[Any, Any, int]:
        """See `Writer.append`."""
        return self._writer.append(stream, payload, final=final)

    async def enqueue(
        self, stream: Stream, payload: bytes, *, final: bool = False, upstream_id: bytes | None = None
    ) -> asyncio.Future[int]:
        """See `Writer.enqueue`."""
        return await self._writer.enqueue(stream, payload, final=final, upstream_id=upstream_id)

    # --- readers ------------------------------------------------------------------------------------------------------

    async def attach(self, key: SessionKey, stream: int | None, after: int | None, *, patience: float) -> Attachment:
        """See `Attachments.attach`."""
        if stream is not None and (stream >= _BIGINT or (after or 0) >= _BIGINT):
            await self.find_session(key)
            raise CursorRejected("unknown")
        return await self._attachments.attach(key, stream, after, patience=patience)

    async def detach(self, stream: int, generation: int, position: int) -> None:
        """See `Attachments.detach`."""
        await self._attachments.detach(stream, generation, position)

    async def close_reader(self, stream: int) -> None:
        """See `Attachments.close`."""
        await self._attachments.close(stream)

    async def read(self, stream: int, after: int, bound: datetime) -> Page:
        """See `Fetcher.read`."""
        return await self._fetcher.read(stream, after, bound)

    def bound_of(self, stream: Stream) -> datetime:
        """The lower bound on the creation of a stream's first event."""
        return _BEGINNING if stream.created_at is None else stream.created_at - MARGIN

    def bound_after(self, event: Event) -> datetime:
        """The lower bound on the creation of what follows `event`."""
        return event.created_at - MARGIN

    # --- streams by name ----------------------------------------------------------------------------------------------

    async def named_stream(self, session_id: str, name: str, key: str, *, adopt: bool) -> tuple[Stream, int]:
        """The open stream of a name in a session, made where there is none, and its last number."""
        if "\0" in session_id or not session_id:
            raise ConfigurationError("A session id has at least one character and no NUL")
        if adopt:
            await self._database.fetch(self._queries.adopt_session, {"session": session_id, "server": ""})
        rows: list[TupleRow] = []
        while not rows:
            rows = await self._database.fetch(
                self._queries.named_stream, {"session": session_id, "request_id": name, "request_key": key}
            )
        number, last_seq, created_at = rows[0]
        return Stream(number, session_id, created_at, shared=True), last_seq

    # --- to the owner of a call ---------------------------------------------------------------------------------------

    async def call_owner(self, session_id: str, request_key: str) -> int | None:
        """The worker that runs a request of the session, None when none does."""
        rows = await self._database.fetch(self._queries.call_owner, {"session": session_id, "request_key": request_key})
        return rows[0][0] if rows else None

    async def session_workers(self, session_id: str) -> list[int]:
        """The workers that run something for the session."""
        rows = await self._database.fetch(self._queries.session_workers, {"session": session_id})
        return [worker for (worker,) in rows]

    async def post(self, workers: list[int], session_id: str, payload: str) -> int:
        """Put a message into the workers' inboxes, durably, and announce it; how many of them live."""
        rows = await self._database.fetch(
            self._queries.post,
            {"workers": Int8Array(workers), "session": session_id, "payload": payload, "prefix": self._prefix},
        )
        return len(rows)


def _record(row: TupleRow) -> SessionRecord | None:
    initialize, protocol_version, log_level, subscriptions, standalone, told = row
    if initialize is None or protocol_version is None or standalone is None:
        return None
    return SessionRecord(
        initialize, protocol_version, log_level, [json.loads(uri) for uri in subscriptions], standalone, told
    )
