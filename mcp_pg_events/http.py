"""POST, GET and DELETE of the handshake era (specification, 2025-11-25, "Streamable HTTP"): status codes and headers.

A request that reaches `HTTPEndpoint` has passed the app's own authentication. What it means is decided here; what it
does is next: `sessions.py` for messages (or `proxy/`, where another program answers them), `reader.py` for streams.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import anyio
from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser, authorization_context
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from mcp_types import (
    INTERNAL_ERROR,
    INVALID_REQUEST,
    ErrorData,
    JSONRPCError,
    JSONRPCRequest,
    JSONRPCResponse,
)
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from . import sse, telemetry
from .answers import Answer, cursor_error, dump, error_response
from .backend import (
    Call,
    RequestInFlight,
    Runners,
    SessionKey,
    SessionLimit,
    Stream,
)
from .errors import DatabaseUnavailable
from .hub import Subscription
from .ids import request_key
from .reader import ReaderOptions
from .requests import read_message, route
from .responses import SESSION_ID, Responses, session_id_of

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["EndpointOptions", "HTTPEndpoint"]

logger = logging.getLogger(__name__)

INITIALIZE_BYTES: Final = 64 * 1024
"""What a session may take for what its client says of itself: it is kept as long as the session."""


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
        self._responses = Responses(store, options.reader, json_response=options.json_response)
        self._security = TransportSecurityMiddleware(options.security)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with self._responses.answering(scope, receive, send):
            await route(
                request,
                self._security,
                post=lambda: self._post(request, receive, send),
                get=lambda: self._get(request, receive, send),
                delete=lambda: self._delete(request),
            )

    # --- POST ---------------------------------------------------------------------------------------------------------

    async def _post(self, request: Request, receive: Receive, send: Send) -> None:
        message, body = await read_message(request, json_response=self._options.json_response)
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
            await self._responses.in_flight(key, running, request, receive, send)
            return
        await self._responses.respond(call.stream, call.protocol_version, subscription, receive, send)

    async def _start(
        self, key: SessionKey, message: JSONRPCRequest, body: bytes, request: Request
    ) -> tuple[Call, Subscription]:
        call = await self._sessions.open_stream(key, message, body)
        subscription = self._hub.subscribe(
            call.stream.number, key.session_id, 1, resumable=self._responses.primes(call.protocol_version)
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
        subscription = self._hub.subscribe(
            opened.stream.number, key.session_id, 1, resumable=self._responses.primes(version)
        )
        subscription.fall_behind()
        await self._responses.respond(opened.stream, version, subscription, receive, send)

    # --- GET ----------------------------------------------------------------------------------------------------------

    async def _get(self, request: Request, receive: Receive, send: Send) -> None:
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
        await self._responses.resume(key, stream, after, request, receive, send)

    # --- DELETE -------------------------------------------------------------------------------------------------------

    async def _delete(self, request: Request) -> None:
        key = self._session_key(request)
        with anyio.CancelScope(shield=True):
            await self._log.end_session(key, "deleted")
        raise Answer(Response(status_code=200, media_type="application/json", headers={SESSION_ID: key.session_id}))

    # --- who asks -----------------------------------------------------------------------------------------------------

    def _session_key(self, request: Request) -> SessionKey:
        return self._key(request, session_id_of(request))

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
