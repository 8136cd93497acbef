"""The streams of the log as HTTP responses: what the endpoints of `http.py` and of the proxy have in common.

Next: `reader.py`, which writes one response.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from mcp_types import INTERNAL_ERROR
from mcp_types.version import is_version_at_least
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import sse, telemetry
from .answers import Answer, cursor_error, error_response
from .backend import Attachment, CursorRejected, RequestInFlight, SessionKey, SessionUnknown, Stream
from .errors import DatabaseRefused, DatabaseUnavailable, Error
from .hub import Subscription
from .reader import ReaderOptions, SSEReader, read_final
from .session import RESUMABLE_SINCE

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["SESSION_ID", "Responses", "session_id_of"]

logger = logging.getLogger(__name__)

SESSION_ID: Final = "mcp-session-id"
HOLD: Final = 2.0
"""How often a GET that is held looks whether it still should be, in seconds."""
_SESSION_ID_PATTERN: Final = re.compile(r"[\x21-\x7e]{1,512}")


def session_id_of(request: Request) -> str:
    """The session that a request names.

    Raises:
        Answer: it names none.
        SessionUnknown: what it names can be no session's id.
    """
    session_id = request.headers.get(SESSION_ID)
    if session_id is None:
        raise Answer(error_response(400, "Bad Request: Missing session ID"))
    if _SESSION_ID_PATTERN.fullmatch(session_id) is None:
        raise SessionUnknown
    return session_id


def _headers(subscription: Subscription) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", b"text/event-stream"),
        (b"cache-control", b"no-cache, no-transform"),
        (b"connection", b"keep-alive"),
        (b"x-accel-buffering", b"no"),
        (SESSION_ID.encode(), subscription.session_id.encode()),
    ]


class Responses:
    """Streams as responses, for one endpoint."""

    def __init__(self, store: PostgresStore, reader: ReaderOptions, *, json_response: bool = False) -> None:
        self._store = store
        self._log = store.log
        self._hub = store.hub
        self._reader = reader
        self._json_response = json_response

    @asynccontextmanager
    async def answering(self, scope: Scope, receive: Receive, send: Send) -> AsyncIterator[None]:
        """Answer a request with what is raised inside the block, if that is an answer or a failure."""
        try:
            yield
        except Answer as answer:
            await answer.response(scope, receive, send)
        except SessionUnknown:
            await error_response(404, "Session not found")(scope, receive, send)
        except DatabaseRefused as error:
            self._store.note_outage(error)
            await error_response(500, "The session store cannot be used", INTERNAL_ERROR)(scope, receive, send)
        except DatabaseUnavailable as error:
            self._store.note_outage(error)
            unavailable = error_response(
                503, "The session store is unavailable, try again", INTERNAL_ERROR, headers={"Retry-After": "1"}
            )
            await unavailable(scope, receive, send)
        except Error as error:
            logger.error("A request failed: %s", error)
            await error_response(500, "The session store cannot be used", INTERNAL_ERROR)(scope, receive, send)
        except ClientDisconnect:
            logger.debug("A client went before its request was whole")

    async def respond(
        self,
        stream: Stream,
        version: str,
        subscription: Subscription,
        receive: Receive,
        send: Send,
        *,
        patience: float = 0.0,
    ) -> None:
        """Answer a request with the stream that was opened for it. `patience` is for how long (seconds) the response
        may wait for the call's end, to be sent in one piece with it."""
        if patience and await self._respond_at_once(subscription, version, send, patience):
            return
        bound = self._log.bound_of(stream)
        if not self._json_response:
            primes = self.primes(version)
            reader = SSEReader(self._log, subscription, position=0, bound=bound, primes=primes, options=self._reader)
            await self._run_reader(reader, subscription, receive, send)
            return
        try:
            payload = await read_final(subscription, self._log, bound, self._reader.outage_timeout)
        finally:
            self._hub.unsubscribe(subscription)
        if payload is None:
            raise Answer(error_response(500, "Session terminated before the request completed", INTERNAL_ERROR))
        headers = {SESSION_ID: stream.session_id}
        raise Answer(Response(payload, media_type="application/json", headers=headers))

    async def _respond_at_once(self, subscription: Subscription, version: str, send: Send, patience: float) -> bool:
        """Send the whole stream, if its end is the first that comes, and comes soon; whether it was."""
        await subscription.wait(patience)
        events = subscription.events
        if subscription.behind or subscription.end_reason is not None or len(events) != 1 or not events[0].final:
            return False
        [event] = subscription.take()
        self._hub.unsubscribe(subscription)
        body = sse.frame(subscription.stream, event.seq, event.payload)
        if self.primes(version):
            body = sse.priming_frame(subscription.stream, 0, self._reader.retry) + body
        headers = [*_headers(subscription), (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
        telemetry.delivered(asyncio.get_running_loop().time() - event.since)
        return True

    def primes(self, protocol_version: str) -> bool:
        """Whether a POST's response begins with an event that its client can resume from (2025-11-25 and later)."""
        return not self._json_response and is_version_at_least(protocol_version, RESUMABLE_SINCE)

    async def resume(
        self, key: SessionKey, stream: int | None, after: int | None, request: Request, receive: Receive, send: Send
    ) -> None:
        """Answer with what follows a position of a stream, as its newest reader."""
        try:
            attachment = await self._attach(key, stream, after, request)
        except CursorRejected as rejected:
            telemetry.resumed(rejected.reason)
            raise Answer(cursor_error(rejected.reason)) from None
        if attachment.complete:
            telemetry.resumed("complete")
            # Nothing will ever follow. 204 tells a client to stop asking (HTML standard, 9.2): the TypeScript SDK's
            # does not take an error for the end of a call, and would come back for ever.
            headers = {SESSION_ID: key.session_id, "content-type": "text/event-stream"}
            raise Answer(Response(status_code=204, headers=headers))
        subscription = self._hub.subscribe(attachment.stream, key.session_id, attachment.generation)
        subscription.fall_behind()
        replay = telemetry.Replay(counted=after is not None)
        reader = SSEReader(
            self._log,
            subscription,
            position=attachment.position,
            bound=attachment.bound,
            primes=is_version_at_least(attachment.protocol_version, RESUMABLE_SINCE),
            options=self._reader,
            replay=replay,
        )
        try:
            await self._run_reader(reader, subscription, receive, send)
        finally:
            replay.over()

    async def _attach(self, key: SessionKey, stream: int | None, after: int | None, request: Request) -> Attachment:
        """Held, rather than refused, while the database is away: the SDK's client gives up after two refusals."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._reader.outage_timeout
        while True:
            try:
                return await self._log.attach(key, stream, after, patience=HOLD)
            except DatabaseRefused:
                raise
            except DatabaseUnavailable:
                if self._store.draining or clock() > deadline or await request.is_disconnected():
                    raise
                await asyncio.sleep(0.25)

    async def _run_reader(self, reader: SSEReader, subscription: Subscription, receive: Receive, send: Send) -> None:
        try:
            await reader.respond(receive, send, _headers(subscription))
        finally:
            self._hub.unsubscribe(subscription)
            if not reader.complete:
                self._store.spawn(self._log.detach(subscription.stream, subscription.generation, reader.position))

    async def in_flight(
        self, key: SessionKey, running: RequestInFlight, request: Request, receive: Receive, send: Send
    ) -> None:
        """Answer a request whose id is in flight: 409, unless the one that is lost its worker. Then this is the same
        one, which a load balancer sends again since it got no answer: it is given the stream, and with it the end of
        the call.

        A kill frees the worker's lock within some milliseconds, and a load balancer is as quick.
        """
        if running.stream is not None and not self._json_response:
            for pause in (0.0, 0.05, 0.2):
                await asyncio.sleep(pause)
                if await self._log.abandoned(running.stream):
                    await self.resume(key, running.stream, 0, request, receive, send)
                    return
        raise Answer(error_response(409, "A request with this id is already in progress in this session"))
