"""POST, GET and DELETE of the handshake era (specification, 2025-11-25, "Streamable HTTP"): status codes and headers.

A request that reaches `HTTPEndpoint` has passed the app's own authentication. What it means is decided here; what it
does is next: `sessions.py` for messages (or `proxy/`, where another program answers them), `reader.py` for streams.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from mcp.server.streamable_http import check_accept_headers
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    ErrorData,
    JSONRPCError,
    JSONRPCRequest,
    JSONRPCResponse,
)
from mcp_types.version import is_version_at_least
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import sse, telemetry
from .answers import Answer, cursor_error, dump, error_response, parse
from .backend import (
    Attachment,
    Call,
    CursorRejected,
    RequestInFlight,
    Runners,
    SessionKey,
    SessionLimit,
    SessionUnknown,
    Stream,
)
from .errors import DatabaseRefused, DatabaseUnavailable, Error
from .hub import Subscription
from .ids import request_key
from .reader import ReaderOptions, SSEReader, read_final
from .session import RESUMABLE_SINCE

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["EndpointOptions", "HTTPEndpoint"]

logger = logging.getLogger(__name__)

SESSION_ID: Final = "mcp-session-id"
INITIALIZE_BYTES: Final = 64 * 1024
"""What a session may take for what its client says of itself: it is kept as long as the session."""
HOLD: Final = 2.0
"""How often a GET that is held looks whether it still should be, in seconds."""
_SESSION_ID_PATTERN: Final = re.compile(r"[\x21-\x7e]{1,512}")


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """What the app was built with, and what `durable` was given. Time-outs in seconds."""

    name: str
    owner: Callable[[Scope], str | None] | None
    json_response: bool
    idle_timeout: float | None
    max_sessions: int | None
    security: TransportSecuritySettings | None
    reader: ReaderOptions


class HTTPEndpoint:
    """The ASGI app that serves handshake-era requests of one MCP endpoint."""

    def __init__(self, store: PostgresStore, sessions: Runners, options: EndpointOptions) -> None:
        self._store = store
        self._log = store.log
        self._hub = store.hub
        self._sessions = sessions
        self._options = options
        self._security = TransportSecurityMiddleware(options.security)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            refusal = await self._security.validate_request(request, is_post=request.method == "POST")
            if refusal is not None:
                raise Answer(refusal)
            match request.method:
                case "POST":
                    await self._post(request, receive, send)
                case "GET":
                    await self._get(request, receive, send)
                case "DELETE":
                    await self._delete(request)
                case _:
                    raise Answer(error_response(405, "Method Not Allowed", headers={"Allow": "GET, POST, DELETE"}))
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

    # --- POST ---------------------------------------------------------------------------------------------------------

    async def _post(self, request: Request, receive: Receive, send: Send) -> None:
        has_json, has_sse = check_accept_headers(request)
        if not (has_json and (has_sse or self._options.json_response)):
            kinds = "application/json" if self._options.json_response else "both application/json and text/event-stream"
            raise Answer(error_response(406, f"Not Acceptable: Client must accept {kinds}"))
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Answer(error_response(415, "Unsupported Media Type: Content-Type must be application/json"))
        body = await request.body()
        message = parse(body)
        telemetry.received(request.scope, message)
        if isinstance(message, JSONRPCRequest) and message.method == "initialize" and len(body) > INITIALIZE_BYTES:
            raise Answer(error_response(413, "Request body too large", INVALID_REQUEST))
        if isinstance(message, JSONRPCRequest) and message.method == "initialize" and SESSION_ID not in request.headers:
            await self._open_session(message, body, request, receive, send)
            return
        key = self._session_key(request)
        if not isinstance(message, JSONRPCRequest):
            await self._sessions.route(key, message, body, request)
            raise Answer(Response(status_code=202, headers={SESSION_ID: key.session_id}))
        # From the stream's opening to its dispatch nothing may come between: an open stream that nobody works on would
        # leave its client waiting. Both are bounded.
        try:
            with anyio.CancelScope(shield=True):
                call, subscription = await self._start(key, message, body, request)
        except RequestInFlight as running:
            if running.stream is None or self._options.json_response or not await self._abandoned(running.stream):
                conflict = "A request with this id is already in progress in this session"
                raise Answer(error_response(409, conflict)) from None
            await self._resume(key, running.stream, 0, request, receive, send)
            return
        await self._respond(call.stream, call.protocol_version, subscription, receive, send)

    async def _abandoned(self, stream: int) -> bool:
        """Whether a request that is in flight lost its worker. Then this is the same one, which a load balancer sends
        again since it got no answer: it is given the stream, and with it the end of the call.

        A kill frees the worker's lock within some milliseconds, and a load balancer is as quick.
        """
        for pause in (0.0, 0.05, 0.2):
            await asyncio.sleep(pause)
            if await self._log.abandoned(stream):
                return True
        return False

    async def _start(
        self, key: SessionKey, message: JSONRPCRequest, body: bytes, request: Request
    ) -> tuple[Call, Subscription]:
        call = await self._sessions.open_stream(key, message, body)
        subscription = self._hub.subscribe(
            call.stream.number, key.session_id, 1, resumable=self._primes(call.protocol_version)
        )
        if call.elsewhere:
            subscription.fall_behind()
        try:
            await self._sessions.start(key, call, message, body, request)
        except BaseException:
            self._hub.unsubscribe(subscription)
            error = ErrorData(code=INTERNAL_ERROR, message="The session could not be restored on this worker")
            failure = JSONRPCError(jsonrpc="2.0", id=message.id, error=error)
            self._store.spawn(self._log.append(call.stream, dump(failure), final=True))
            raise
        return call, subscription

    async def _open_session(
        self, message: JSONRPCRequest, body: bytes, request: Request, receive: Receive, send: Send
    ) -> None:
        """A client's first request: its session is recorded before its id leaves the process."""
        if self._store.draining:
            raise Answer(
                error_response(
                    503, "The server is shutting down, try again", INTERNAL_ERROR, headers={"Retry-After": "1"}
                )
            )
        key = self._key(request, uuid4().hex)
        recorded = established = False
        try:
            session = self._sessions.open(key)
            answers = await session.initialize(message, body, request)
            if not answers:
                raise DatabaseUnavailable("This worker lost its number while the session began; send it again")
            if self._sessions.bound and await request.is_disconnected():
                # It had not the patience for what has to be started, and would never learn the session's id.
                raise ClientDisconnect
            *notices, answer = answers
            if not isinstance(answer, JSONRPCResponse):
                raise Answer(Response(dump(answer), media_type="application/json"))
            version = str(answer.result["protocolVersion"])
            with anyio.CancelScope(shield=True):
                opened = await self._log.open_session(
                    key,
                    initialize=json.dumps(message.params or {}),
                    protocol_version=version,
                    request_id=json.dumps(message.id),
                    request_key=request_key(message.id),
                    limit=self._options.max_sessions,
                    bound=self._sessions.bound,
                )
                recorded = True
                session.standalone = Stream(opened.standalone, key.session_id, shared=True)
                for notice in notices:
                    await self._log.append(opened.stream, dump(notice))
                await self._log.append(opened.stream, dump(answer), final=True)
                established = True
        except SessionLimit as limit:
            logger.warning("Refusing to open a new session: %s", limit)
            raise Answer(error_response(503, "Too many open sessions", INTERNAL_ERROR)) from None
        finally:
            if not established:
                self._sessions.session_ended(key.session_id)
                if recorded:
                    # Nobody knows its id.
                    self._store.spawn(self._log.end_session(key, "failed"))
        subscription = self._hub.subscribe(opened.stream.number, key.session_id, 1, resumable=self._primes(version))
        subscription.fall_behind()
        await self._respond(opened.stream, version, subscription, receive, send)

    async def _respond(
        self, stream: Stream, version: str, subscription: Subscription, receive: Receive, send: Send
    ) -> None:
        bound = self._log.bound_of(stream)
        if not self._options.json_response:
            primes = self._primes(version)
            reader = SSEReader(
                self._log, subscription, position=0, bound=bound, primes=primes, options=self._options.reader
            )
            await self._run_reader(reader, subscription, receive, send)
            return
        try:
            payload = await read_final(subscription, self._log, bound, self._options.reader.outage_timeout)
        finally:
            self._hub.unsubscribe(subscription)
        if payload is None:
            raise Answer(error_response(500, "Session terminated before the request completed", INTERNAL_ERROR))
        headers = {SESSION_ID: stream.session_id}
        raise Answer(Response(payload, media_type="application/json", headers=headers))

    def _primes(self, protocol_version: str) -> bool:
        """Whether a POST's response begins with an event that its client can resume from (2025-11-25 and later)."""
        return not self._options.json_response and is_version_at_least(protocol_version, RESUMABLE_SINCE)

    # --- GET ----------------------------------------------------------------------------------------------------------

    async def _get(self, request: Request, receive: Receive, send: Send) -> None:
        if not check_accept_headers(request)[1]:
            raise Answer(error_response(406, "Not Acceptable: Client must accept text/event-stream"))
        key = self._session_key(request)
        stream: int | None = None
        after: int | None = None
        if (last_event_id := request.headers.get("last-event-id")) is not None:
            if (cursor := sse.parse_event_id(last_event_id)) is None:
                # Whose session it is comes first, so that this tells nobody anything.
                await self._log.find_session(key)
                telemetry.resumed("malformed")
                raise Answer(cursor_error("malformed"))
            stream, after = cursor
        await self._resume(key, stream, after, request, receive, send)

    async def _resume(
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
            options=self._options.reader,
            replay=replay,
        )
        try:
            await self._run_reader(reader, subscription, receive, send)
        finally:
            replay.over()

    async def _attach(self, key: SessionKey, stream: int | None, after: int | None, request: Request) -> Attachment:
        """Held, rather than refused, while the database is away: the SDK's client gives up after two refusals."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._options.reader.outage_timeout
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
        headers = [
            (b"content-type", b"text/event-stream"),
            (b"cache-control", b"no-cache, no-transform"),
            (b"connection", b"keep-alive"),
            (b"x-accel-buffering", b"no"),
            (SESSION_ID.encode(), subscription.session_id.encode()),
        ]
        try:
            await reader.respond(receive, send, headers)
        finally:
            self._hub.unsubscribe(subscription)
            if not reader.complete:
                self._store.spawn(self._log.detach(subscription.stream, subscription.generation, reader.position))

    # --- DELETE -------------------------------------------------------------------------------------------------------

    async def _delete(self, request: Request) -> None:
        key = self._session_key(request)
        with anyio.CancelScope(shield=True):
            await self._log.end_session(key, "deleted")
        raise Answer(Response(status_code=200, media_type="application/json", headers={SESSION_ID: key.session_id}))

    # --- who asks -----------------------------------------------------------------------------------------------------

    def _session_key(self, request: Request) -> SessionKey:
        session_id = request.headers.get(SESSION_ID)
        if session_id is None:
            raise Answer(error_response(400, "Bad Request: Missing session ID"))
        if _SESSION_ID_PATTERN.fullmatch(session_id) is None:
            raise SessionUnknown
        return self._key(request, session_id)

    def _key(self, request: Request, session_id: str) -> SessionKey:
        return SessionKey(session_id, self._options.name, self._principal(request.scope), self._options.idle_timeout)

    def _principal(self, scope: Scope) -> str | None:
        """Who the session is bound to: what `owner=` says, else the SDK's principal (client, issuer, subject)."""
        if self._options.owner is not None:
            owner = self._options.owner(scope)
            # As JSON, which writes NUL and lone surrogates as escapes: PostgreSQL's text takes neither.
            return None if owner is None else json.dumps(str(owner))
        user: Any = scope.get("user")
        if not isinstance(user, AuthenticatedUser):
            return None
        context = authorization_context(user)
        return json.dumps([context["client_id"], context["issuer"], context["subject"]])
