"""One MCP session on this worker: the SDK's dispatcher and connection, between the HTTP side and the log.

The session's own object is the dispatcher's write stream: a message that the server sends is appended in the task of
whoever sends it, so no router stands in between that could die. Ids of requests to the client get the worker's number
on their way out and lose it on their way in, since every worker's dispatcher counts from 1. Next: `log.append`.
"""

from __future__ import annotations

import contextvars
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final

import anyio
import pydantic_core
from mcp.server import Server
from mcp.server.connection import Connection
from mcp.server.runner import serve_connection
from mcp.shared.dispatcher import coerce_request_id
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from mcp.shared.message import ServerMessageMetadata, SessionMessage
from mcp.shared.transport_context import TransportContext
from mcp_types import (
    INTERNAL_ERROR,
    ErrorData,
    InitializeRequestParams,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
)
from mcp_types.version import is_version_at_least
from starlette.requests import Request

from .backend import EventLog, SessionRecord, Stream
from .errors import AppendRefused, Error
from .hub import Hub
from .ids import incoming, outgoing
from .inlet import Inlet

__all__ = ["REQUEST_CANCELLED", "RESUMABLE_SINCE", "Session"]

logger = logging.getLogger(__name__)

REQUEST_CANCELLED: Final = -32800
"""The error of a request that settled unanswered, as the SDK's own transport gives it (and the language server
protocol)."""

RESUMABLE_SINCE: Final = "2025-11-25"
"""The protocol version from which clients know priming events and polling (SEP-1699)."""

RESTORE_TIMEOUT: Final = 5.0

_incarnations = itertools.count(1)


@dataclass(slots=True, eq=False)
class _Call:
    """A request in progress. Without a stream its messages are kept, until `initialize` has made one, or dropped."""

    request: JSONRPCRequest
    stream: Stream | None
    kept: list[JSONRPCMessage] = field(default_factory=list)
    answered: anyio.Event = field(default_factory=anyio.Event)


class Session:
    """A session's loop here; `json_response` leaves a call no room for anything but its answer."""

    def __init__(
        self,
        server: Server[Any],
        lifespan_state: Any,
        log: EventLog,
        hub: Hub,
        *,
        session_id: str,
        owner: str | None,
        worker: Callable[[], int],
        json_response: bool,
        on_over: Callable[[Session], None],
    ) -> None:
        self.session_id = session_id
        self.owner = owner
        self.incarnation = next(_incarnations)
        self.standalone: Stream | None = None
        self._server = server
        self._lifespan_state = lifespan_state
        self._log = log
        self._hub = hub
        self._worker = worker
        self._json_response = json_response
        self._on_over = on_over
        self._inlet = Inlet()
        self._calls: dict[RequestId, _Call] = {}
        self._over = False
        self._catching_up = anyio.Lock()
        self._replays = itertools.count()
        self._told = 0
        self._last: tuple[contextvars.Context, Request] | None = None
        self._told_level: str | None = None
        self._told_subscriptions: dict[str, None] = {}
        self._scope = anyio.CancelScope()
        self._dispatcher: JSONRPCDispatcher[TransportContext] = JSONRPCDispatcher(
            self._inlet, self, inline_methods=frozenset({"initialize"})
        )
        self.connection = Connection.for_loop(self._dispatcher, session_id=session_id)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the session ends here."""
        try:
            with self._scope:
                await serve_connection(
                    self._server, self._dispatcher, connection=self.connection, lifespan_state=self._lifespan_state
                )
        except Exception:
            logger.exception("Session %s crashed on this worker", self.session_id)
        finally:
            self._over = True
            for call in self._calls.values():
                call.answered.set()
            self._on_over(self)

    def end(self) -> None:
        """Cancel what runs here. Finals are somebody else's by then."""
        self._over = True
        self._scope.cancel()

    def restore(self, record: SessionRecord) -> None:
        """Stand where `initialize` on another worker left the session."""
        self.connection.client_params = InitializeRequestParams.model_validate_json(record.initialize, by_name=False)
        self.connection.protocol_version = record.protocol_version
        self.connection.initialized.set()
        self.standalone = Stream(record.standalone, self.session_id, shared=True)

    async def catch_up(self, record: SessionRecord, request: Request | None) -> None:
        """Let the handlers here know what the client has told the session on other workers: log level, subscriptions
        and their ends, a second `initialize`. Their answers are dropped, and what they refuse is not noted as told.

        They run as in `request`; without one as in the last that its client sent here, which tells them who asks.
        """
        if request is not None:
            self._last = _remember(request)
        if (last := self._last) is None:
            return
        async with self._catching_up:
            if record.told < self._told:
                return
            self._told = record.told
            self.connection.client_params = InitializeRequestParams.model_validate_json(
                record.initialize, by_name=False
            )
            self.connection.protocol_version = record.protocol_version
            await self._replay(record, *last)

    async def _replay(self, record: SessionRecord, context: contextvars.Context, request: Request) -> None:
        known, wanted = self._told_subscriptions, dict.fromkeys(record.subscriptions)
        replayed: list[tuple[str, str]] = []
        if record.log_level is not None and record.log_level != self._told_level:
            replayed.append(("logging/setLevel", record.log_level))
        replayed += [("resources/unsubscribe", uri) for uri in known if uri not in wanted]
        replayed += [("resources/subscribe", uri) for uri in wanted if uri not in known]
        calls = []
        for method, value in replayed:
            request_id = f"mcp_pg_events.replay-{next(self._replays)}"
            params = {"level" if method == "logging/setLevel" else "uri": value}
            call = _Call(JSONRPCRequest(jsonrpc="2.0", id=request_id, method=method, params=params), None)
            calls.append((method, value, call))
            self._calls[request_id] = call
            metadata = ServerMessageMetadata(request_context=request, can_send_request=False)
            context.copy().run(self._feed, call.request, metadata)
        with anyio.move_on_after(RESTORE_TIMEOUT):
            for _, _, call in calls:
                await call.answered.wait()
        for method, value, call in calls:
            if call.kept and isinstance(call.kept[-1], JSONRPCResponse):
                self._note_told(method, value)

    def _note_told(self, method: str, value: str) -> None:
        match method:
            case "logging/setLevel":
                self._told_level = value
            case "resources/subscribe":
                self._told_subscriptions = self._told_subscriptions | {value: None}
            case "resources/unsubscribe":
                self._told_subscriptions = {uri: None for uri in self._told_subscriptions if uri != value}

    def behind(self, told: int) -> bool:
        """Whether the client has told other workers something that this object does not know."""
        return told > self._told

    # --- in -----------------------------------------------------------------------------------------------------------

    async def initialize(self, message: JSONRPCRequest, body: bytes, request: Request) -> list[JSONRPCMessage]:
        """Run a session's first request. What it answered (the last one) and sent before, none of it stored yet."""
        self._last = _remember(request)
        call = self._calls[coerce_request_id(message.id)] = _Call(message, None)
        self._feed(message, self._metadata(request, call))
        await call.answered.wait()
        return call.kept

    def start(self, message: JSONRPCRequest, stream: Stream, request: Request) -> None:
        """Run a request whose stream is open. It goes on whatever becomes of the HTTP request."""
        self._last = _remember(request)
        call = self._calls[coerce_request_id(message.id)] = _Call(message, stream)
        stream.on_ended = lambda: self._cancel(call)
        self._feed(message, self._metadata(request, call))
        if stream.ended:
            # While the session was being restored: its DELETE, say.
            self._cancel(call)

    def deliver(self, message: JSONRPCMessage, request: Request | None) -> None:
        """A client's notification, or its answer to a request of ours that names this session object."""
        message = incoming(message)
        self._feed(message, ServerMessageMetadata(request_context=request, can_send_request=False))

    def _feed(self, message: JSONRPCMessage, metadata: ServerMessageMetadata) -> None:
        if self._over:
            return
        self._inlet.put(SessionMessage(message, metadata))

    def _metadata(self, request: Request, call: _Call) -> ServerMessageMetadata:
        async def unanswered() -> None:
            error = ErrorData(code=REQUEST_CANCELLED, message="Request cancelled")
            await self.send(SessionMessage(JSONRPCError(jsonrpc="2.0", id=call.request.id, error=error)))

        async def close_stream() -> None:
            if call.stream is not None:
                await self._close_reader(call.stream)

        async def close_standalone() -> None:
            if self.standalone is not None:
                await self._close_reader(self.standalone)

        polls = is_version_at_least(self.connection.protocol_version, RESUMABLE_SINCE) and not self._json_response
        return ServerMessageMetadata(
            request_context=request,
            close_sse_stream=close_stream if polls else None,
            close_standalone_sse_stream=close_standalone if polls else None,
            on_request_unanswered=unanswered,
            can_send_request=not self._json_response,
        )

    async def _close_reader(self, stream: Stream) -> None:
        if not self._hub.end_stream(stream.number, "closed"):
            try:
                await self._log.close_reader(stream.number)
            except Error as error:
                logger.warning("A client's connection could not be closed: %s", error)

    def _cancel(self, call: _Call) -> None:
        """Somebody else wrote the call's final. Its handler is told as by a client's cancellation."""
        key = coerce_request_id(call.request.id)
        if self._calls.get(key) is not call:
            return
        del self._calls[key]
        params = {"requestId": call.request.id, "reason": "the request has ended"}
        self._feed(
            JSONRPCNotification(jsonrpc="2.0", method="notifications/cancelled", params=params),
            ServerMessageMetadata(can_send_request=False),
        )

    # --- out: the dispatcher's write stream ---------------------------------------------------------------------------

    async def send(self, item: SessionMessage) -> None:
        """Store one message that the server sends, and return once it is committed.

        Raises:
            anyio.ClosedResourceError: the session has ended here; the dispatcher drops what it was sending.
        """
        message = item.message
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            await self._answer(message)
            return
        if self._over:
            raise anyio.ClosedResourceError
        related = item.metadata.related_request_id if isinstance(item.metadata, ServerMessageMetadata) else None
        message = outgoing(message, self._worker(), self.incarnation)
        if related is None:
            if self.standalone is None:
                logger.debug("Dropped %s: the session has no standalone stream yet", message.method)
                return
            await self._append(self.standalone, _encode(message))
            return
        call = self._calls.get(coerce_request_id(related))
        if call is None or self._json_response:
            logger.debug("Dropped %s: its request has no stream to carry it", message.method)
        elif call.stream is None:
            call.kept.append(message)
        else:
            await self._append(call.stream, _encode(message))

    async def _answer(self, message: JSONRPCResponse | JSONRPCError) -> None:
        call = self._calls.get(coerce_request_id(message.id)) if message.id is not None else None
        if call is None:
            logger.debug("Dropped an answer: its request has ended")
            return
        if call.stream is None:
            del self._calls[coerce_request_id(call.request.id)]
            call.kept.append(message)
            call.answered.set()
            return
        if isinstance(message, JSONRPCResponse):
            await self._record(call.request, message)
        try:
            payload = _encode(message)
        except ValueError as error:
            # A lone surrogate, say: no UTF-8 and so no JSON can carry it.
            data = ErrorData(code=INTERNAL_ERROR, message=f"The result cannot be encoded as JSON: {error}")
            payload = _encode(JSONRPCError(jsonrpc="2.0", id=call.request.id, error=data))
        # Gone before the final is visible: the id may be used again from then on, and on this worker at once.
        if self._calls.get(coerce_request_id(call.request.id)) is call:
            del self._calls[coerce_request_id(call.request.id)]
        await self._append(call.stream, payload, final=True)

    async def _append(self, stream: Stream, payload: bytes, *, final: bool = False) -> None:
        try:
            await self._log.append(stream, payload, final=final)
        except AppendRefused as error:
            logger.debug("Not stored in stream %d: %s", stream.number, error)
        except Error as error:
            if not self._over:
                logger.error("Session %s ends on this worker: %s", self.session_id, error)
            self.end()
            raise anyio.ClosedResourceError from error

    async def _record(self, request: JSONRPCRequest, response: JSONRPCResponse) -> None:
        """What the session has to remember of a request that succeeded, before its client knows that it did."""
        params = request.params or {}
        told = 0
        try:
            match request.method:
                case "initialize":
                    version = str(response.result["protocolVersion"])
                    told = await self._log.renew_session(self.session_id, json.dumps(params), version)
                case "logging/setLevel":
                    self._note_told(request.method, level := str(params.get("level")))
                    told = await self._log.record_log_level(self.session_id, level)
                case "resources/subscribe":
                    self._note_told(request.method, uri := str(params.get("uri")))
                    told = await self._log.record_subscription(self.session_id, uri, True)
                case "resources/unsubscribe":
                    self._note_told(request.method, uri := str(params.get("uri")))
                    told = await self._log.record_subscription(self.session_id, uri, False)
            if told == self._told + 1:
                self._told = told
        except Error as error:
            logger.warning("Session %s could not record %s: %s", self.session_id, request.method, error)

    async def aclose(self) -> None:
        """The dispatcher is through."""
        self._over = True

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


def _remember(request: Request) -> tuple[contextvars.Context, Request]:
    """Who asks, without what was asked: its body may be large."""
    return contextvars.copy_context(), Request(request.scope)


def _encode(message: JSONRPCMessage) -> bytes:
    """The message's one serialisation: from here to the wire it is bytes.

    Raises:
        ValueError: JSON in UTF-8 cannot carry it.
    """
    try:
        return message.model_dump_json(by_alias=True, exclude_unset=True).encode()
    except (pydantic_core.PydanticSerializationError, UnicodeEncodeError) as error:
        raise ValueError(str(error).removeprefix("Error serializing to JSON: ")) from None
