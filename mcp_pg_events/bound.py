"""Sessions that live on one worker: what runs them there cannot be made again elsewhere, a process for instance.

Any worker takes their requests all the same. One that lands elsewhere gets its stream there, with its reader, and
travels by the owner's inbox, in one commit; the owner appends, and the reader is woken as any other. Next: `proxy/`.
"""

from __future__ import annotations

import json

from mcp_types import JSONRPCRequest

from .appends import Identity
from .backend import Call, RequestInFlight, SessionKey, SessionUnknown, Stream
from .database import Database
from .hub import Hub
from .ids import request_key
from .inbox import Inbox
from .log import Log
from .queries import Queries, asking

__all__ = ["BoundSessions"]


class BoundSessions:
    """The log's part for sessions that `open_session` bound to their worker."""

    def __init__(
        self, database: Database, queries: Queries, identity: Identity, log: Log, hub: Hub, inbox: Inbox, prefix: str
    ) -> None:
        self._database = database
        self._queries = queries
        self._identity = identity
        self._log = log
        self._hub = hub
        self._inbox = inbox
        self._prefix = prefix

    async def open_stream(self, key: SessionKey, message: JSONRPCRequest, body: bytes | None) -> Call:
        """Open the stream of a request, with its reader here, and send the request to the session's worker. Where that
        is this one, `body` is not needed, and `collect` comes next where the result says that `letters` wait.

        Raises:
            SessionUnknown: no such session for this asker, or its worker is gone.
            RequestInFlight: a request with this id is running in the session.
        """
        request = request_key(message.id)
        me = self._identity.number
        with self._log.opening(key, request):
            rows = await self._database.fetch(
                self._queries.open_bound_stream,
                asking(key)
                | {
                    "request_id": json.dumps(message.id),
                    "request_key": request,
                    "method": message.method.replace("\0", "")[:200],
                    "me": me,
                    "payload": None if body is None else body.decode(),
                    "prefix": self._prefix,
                },
            )
            if not rows:
                raise SessionUnknown
            owner, epoch, number, created_at, protocol_version, told, *row = rows[0]
            busy, busy_created_at, busy_worker, reader_worker, generation, letters, _ = row
            if number is None:
                # This worker's own, whose first answer was lost: it opened it, and neither reads nor runs it.
                mine = reader_worker == me and generation == 1 and busy_worker == owner
                if not mine or self._hub.reads(busy) or self._log.runs(busy):
                    raise RequestInFlight
                number, created_at = busy, busy_created_at
            if owner == me:
                stream = self._log.own(me, epoch, number, key.session_id, created_at, request)
            else:
                self._log.check_identity(me)
                stream = Stream(number, key.session_id, created_at, request)
        return Call(stream, protocol_version, told, None, elsewhere=owner != me, letters=letters)

    async def collect(self) -> None:
        """Return when everything that was sent to this worker by now has been delivered."""
        await self._inbox.collect()

    async def owner(self, key: SessionKey) -> int:
        """The worker that a session lives on. Where that is this one, what was sent to it before has been delivered.

        Raises:
            SessionUnknown: no such session for this asker, or its worker is gone.
        """
        rows = await self._database.fetch(self._queries.session_owner, asking(key) | {"me": self._identity.number})
        if not rows:
            raise SessionUnknown
        worker: int
        worker, letters = rows[0]
        if letters:
            await self._inbox.collect()
        return worker

    async def post(self, worker: int, session_id: str, body: bytes) -> None:
        """Send a message that is no request to the session's worker.

        Raises:
            SessionUnknown: that worker is gone, and the session with it.
        """
        if not await self._log.post([worker], session_id, body.decode()):
            raise SessionUnknown
