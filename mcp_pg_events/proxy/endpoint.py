"""The HTTP proxy's endpoint: POST, GET and DELETE of the handshake era (specification, 2025-11-25, "Streamable HTTP").

A request goes to the upstream as it is; a stream of events that comes back goes through the log, so that any replica
can go on delivering it. Whatever is served out of the log needs the upstream's word first (`admission.py`). Next:
`relays.py` for what comes back, `responses.py` for what is delivered.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import anyio
import pydantic_core
from mcp.server.transport_security import TransportSecurityMiddleware, TransportSecuritySettings
from mcp_types import INTERNAL_ERROR, JSONRPCRequest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .. import sse, telemetry
from ..answers import Answer, cursor_error, error_response
from ..backend import OpenedSession, RequestInFlight, SessionKey, SessionLimit, Stream
from ..errors import Error
from ..finals import final_error
from ..ids import request_key
from ..reader import ReaderOptions
from ..relayed import RelayedSession
from ..requests import read_message, route
from ..responses import SESSION_ID, Responses
from .admission import Admission, Admitted
from .messages import CANCELLED, error_of
from .relay import AT_ONCE, Asker
from .relays import Relays
from .replies import failure, messages_until, passed_on, stored
from .upstream import EVENT_STREAM, Reply, Upstream, UpstreamFailed

if TYPE_CHECKING:
    from ..store import PostgresStore

__all__ = ["ProxyEndpoint", "ProxyOptions"]

logger = logging.getLogger(__name__)

BODY_TIMEOUT: Final = 60.0
"""How long (seconds) the body of an answer may take that is no stream."""
STANDALONE_PAUSE: Final = 0.25
STANDALONE_PATIENCE: Final = 5.0
"""How long (seconds) an upstream may take to notice that the connection before is gone (409)."""


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """What `proxy_app` was given. Times in seconds."""

    max_message_size: int
    security: TransportSecuritySettings | None
    reader: ReaderOptions


class ProxyEndpoint:
    """The ASGI app that serves handshake-era requests from the upstream and the log."""

    def __init__(
        self, store: PostgresStore, upstream: Upstream, relays: Relays, admission: Admission, options: ProxyOptions
    ) -> None:
        self._store = store
        self._log = store.log
        self._hub = store.hub
        self._upstream = upstream
        self._relays = relays
        self._admission = admission
        self._options = options
        self._responses = Responses(store, options.reader)
        self._security = TransportSecurityMiddleware(options.security)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        async with self._responses.answering(scope, receive, send):
            try:
                await route(
                    request,
                    self._security,
                    post=lambda: self._post(request, receive, send),
                    get=lambda: self._get(request, receive, send),
                    delete=lambda: self._delete(request),
                )
            except UpstreamFailed as failed:
                logger.warning("A request failed: %s", failed)
                raise Answer(failure(failed)) from None

    # --- POST ---------------------------------------------------------------------------------------------------------

    async def _post(self, request: Request, receive: Receive, send: Send) -> None:
        message, body = await read_message(request)
        if isinstance(message, JSONRPCRequest) and message.method == "initialize" and SESSION_ID not in request.headers:
            await self._open_session(message, body, request, receive, send)
            return
        admitted = await self._admission.admit(request)
        key, session, asker = admitted.key, admitted.session, admitted.asker
        if not isinstance(message, JSONRPCRequest):
            reply = await self._send("POST", session, asker, body)
            answer = passed_on(reply, await reply.body(BODY_TIMEOUT), key.session_id)
            await self._admission.refused(admitted, reply.status)
            if reply.status < 300:
                await self._relays.cancelled(key, message)
            raise Answer(answer)
        try:
            with anyio.CancelScope(shield=True):
                call = await self._log.open_stream(
                    key,
                    request_id=json.dumps(message.id),
                    request_key=request_key(message.id),
                    method=message.method,
                    restore=False,
                    elsewhere=True,
                )
        except RequestInFlight as running:
            with self._relays.waiting(key, session, running.stream or 0, asker):
                await self._responses.in_flight(key, running, request, receive, send)
            return
        stream = call.stream
        answered = False
        lost = final_error("upstream_lost")
        try:
            payload = b""
            with self._relays.asking(key, stream, message.id) as asked:
                reply = await self._send("POST", session, asker, body)
                streams = reply.is_stream and not reply.is_encoded
                if not streams:
                    # Some servers send the head of an answer at once, and the body when the tool is done.
                    payload = await reply.body(max(BODY_TIMEOUT, self._upstream.timeout))
            if asked.cancelled_caught and stream.ended:
                # What the call ended with is in the log, or will be.
                answered = True
                subscription = self._hub.subscribe(stream.number, key.session_id, 1)
                subscription.fall_behind()
                await self._responses.respond(stream, session.protocol_version, subscription, receive, send)
                return
            if asked.cancelled_caught:
                lost = CANCELLED
                headers = {SESSION_ID: key.session_id}
                raise Answer(Response(error_of(message.id, lost), media_type="application/json", headers=headers))
            if streams:
                subscription = self._hub.subscribe(
                    stream.number, key.session_id, 1, resumable=self._responses.primes(session.protocol_version)
                )
                relay = self._relays.read(key, session, stream, message.id, asker, reply)
                if asked.deadline < math.inf:
                    relay.cancelled()
                answered = True
                with self._relays.waiting(key, session, stream.number, asker):
                    # An answer that comes at once is sent in one piece: its client has waited for the upstream without
                    # an id in any case.
                    await self._responses.respond(
                        stream, session.protocol_version, subscription, receive, send, patience=AT_ONCE
                    )
                return
            is_json = reply.media_type == "application/json" and not reply.is_encoded and b"\0" not in payload
            if reply.status == 200 and is_json:
                # It may be gone before its client has it, and its id is free again once it is stored.
                await self._log.append(stream, stored(payload), final=True)
                answered = True
            else:
                await self._admission.refused(admitted, reply.status)
            raise Answer(passed_on(reply, payload, key.session_id))
        finally:
            if not answered:
                await self._free(stream, error_of(message.id, lost))

    async def _free(self, stream: Stream, error: bytes) -> None:
        """End a call that the upstream did not take, before its client hears of it: one that was refused for its token
        sends the same request again at once, with another."""
        try:
            await self._log.append(stream, error, final=True)
        except Error as failed:
            logger.debug("Not stored in stream %d: %s", stream.number, failed)

    async def _send(self, method: str, session: RelayedSession | None, asker: Asker, body: bytes | None) -> Reply:
        reply = await self._upstream.request(
            method,
            asker.headers,
            query=asker.query,
            body=body,
            session_id=None if session is None else session.upstream,
        )
        reply.refuse_redirect()
        return reply

    async def _open_session(
        self, message: JSONRPCRequest, body: bytes, request: Request, receive: Receive, send: Send
    ) -> None:
        """A client's first request: its session is recorded before its id leaves the process."""
        if self._store.draining:
            busy = error_response(
                503, "The server is shutting down, try again", INTERNAL_ERROR, headers={"Retry-After": "1"}
            )
            raise Answer(busy)
        asker = self._admission.asker(request)
        reply = await self._send("POST", None, asker, body)
        if reply.status != 200 or reply.is_encoded or reply.media_type not in ("application/json", EVENT_STREAM):
            raise Answer(passed_on(reply, await reply.body(BODY_TIMEOUT)))
        payloads = await messages_until(reply, message.id, self._options.max_message_size, BODY_TIMEOUT)
        answer: Any = pydantic_core.from_json(payloads[-1])
        version = answer.get("result", {}).get("protocolVersion") if isinstance(answer.get("result"), dict) else None
        if not isinstance(version, str):
            raise Answer(Response(payloads[-1], media_type="application/json"))
        key = self._admission.key(uuid4().hex)
        upstream_id = reply.header(SESSION_ID)
        try:
            with anyio.CancelScope(shield=True):
                opened = await self._record(key, message, version, upstream_id, payloads)
        except Error:
            if upstream_id is not None:
                self._store.spawn(self._forget(asker, upstream_id))
            raise
        self._admission.opened(key, asker)
        if not reply.is_stream:
            raise Answer(passed_on(reply, payloads[-1], key.session_id))
        subscription = self._hub.subscribe(
            opened.stream.number, key.session_id, 1, resumable=self._responses.primes(version)
        )
        subscription.fall_behind()
        await self._responses.respond(opened.stream, version, subscription, receive, send)

    async def _forget(self, asker: Asker, upstream_id: str) -> None:
        """End a session of the upstream's that could not be recorded: its client will open another."""
        headers = {name: value for name, value in asker.headers.items() if name != "content-type"}
        try:
            reply = await self._upstream.request("DELETE", headers, query=asker.query, session_id=upstream_id)
            reply.close()
        except UpstreamFailed as failed:
            logger.debug("A session that could not be recorded stays open at the upstream: %s", failed)

    async def _record(
        self, key: SessionKey, message: JSONRPCRequest, version: str, upstream_id: str | None, payloads: list[bytes]
    ) -> OpenedSession:
        try:
            opened = await self._log.open_session(
                key,
                # What the upstream keeps for itself is not kept here.
                initialize="{}",
                protocol_version=version,
                request_id=json.dumps(message.id),
                request_key=request_key(message.id),
                limit=None,
                upstream=upstream_id or "",
            )
        except SessionLimit as limit:
            raise AssertionError("No limit was given") from limit
        for place, payload in enumerate(payloads, 1):
            await self._log.append(opened.stream, payload, final=place == len(payloads))
        return opened

    # --- GET ----------------------------------------------------------------------------------------------------------

    async def _get(self, request: Request, receive: Receive, send: Send) -> None:
        admitted = await self._admission.admit(request, held=True)
        key, session, asker = admitted.key, admitted.session, admitted.asker
        stream, after = session.standalone, None
        if (last_event_id := request.headers.get("last-event-id")) is not None:
            if (cursor := sse.parse_event_id(last_event_id)) is None:
                telemetry.resumed("malformed")
                raise Answer(cursor_error("malformed"))
            stream, after = cursor
        with self._relays.waiting(key, session, stream, asker):
            if stream == session.standalone and not self._relays.reads(stream):
                await self._read_standalone(admitted)
            else:
                await self._relays.take_over(stream)
            await self._responses.resume(key, stream, after, request, receive, send)

    async def _read_standalone(self, admitted: Admitted) -> None:
        """Have the upstream's standalone stream read by one replica: this one, if no other does.

        Raises:
            Answer: the upstream offers none, or refuses it.
        """
        key, session, asker = admitted.key, admitted.session, admitted.asker
        claim = await self._store.relayed.claim(key, session.standalone)
        if claim is None:
            return
        deadline = asyncio.get_running_loop().time() + STANDALONE_PATIENCE
        reply: Reply | None = None
        try:
            extra = [("accept", EVENT_STREAM)]
            if claim.last_id is not None:
                extra.append(("last-event-id", claim.last_id.decode("utf-8", "replace")))
            while True:
                reply = await self._upstream.request(
                    "GET", asker.headers, query=asker.query, session_id=session.upstream, extra=extra
                )
                if reply.status != 409 or asyncio.get_running_loop().time() > deadline:
                    break
                reply.close()
                await asyncio.sleep(STANDALONE_PAUSE)
            reply.refuse_redirect()
            if reply.is_stream and not reply.is_encoded:
                self._relays.read(key, session, claim.stream, None, asker, reply, claim)
                return
            if reply.status == 400 and claim.last_id is not None:
                reply.close()
                self._relays.read(key, session, claim.stream, None, asker, None, claim)
                return
            await self._admission.refused(admitted, reply.status)
            raise Answer(passed_on(reply, await reply.body(BODY_TIMEOUT), key.session_id))
        except BaseException:
            self._store.spawn(self._store.relayed.release([claim.stream]))
            raise

    # --- DELETE -------------------------------------------------------------------------------------------------------

    async def _delete(self, request: Request) -> None:
        admitted = await self._admission.admit(request)
        key, session, asker = admitted.key, admitted.session, admitted.asker
        if session.upstream is None:
            # It has no session there that could end.
            await self._log.end_session(key, "deleted")
            raise Answer(Response(status_code=200, headers={SESSION_ID: key.session_id}))
        reply = await self._send("DELETE", session, asker, None)
        body = await reply.body(BODY_TIMEOUT)
        if reply.status < 300 or reply.status == 404:
            with anyio.CancelScope(shield=True):
                await self._log.end_session(key, "deleted")
        raise Answer(passed_on(reply, body, key.session_id))
