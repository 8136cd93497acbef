"""The sessions of one app that this worker has met, and their upkeep.

A session comes here by its `initialize`, or by a request that landed here and is then restored from the log. Its object
stays until the session ends, since the server's own code may hold it and go on sending. Next: `session.py` runs what
`http.py` brought.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc
from mcp.server import Server
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp_types import (
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    jsonrpc_message_adapter,
)
from starlette.requests import Request

from .backend import App, Call, SessionKey, SessionRecord, Stream
from .ids import parse_wire_id, request_key
from .session import Session
from .upkeep import keep_up

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["Sessions"]

logger = logging.getLogger(__name__)


class Sessions:
    """Session objects by id, for the lifetime of the app: `backend.Runners` over the SDK's dispatcher."""

    bound = False

    def __init__(
        self,
        server: Server[Any],
        lifespan_state: Any,
        store: PostgresStore,
        *,
        name: str,
        json_response: bool,
        idle_timeout: float | None,
    ) -> None:
        self._server = server
        self._lifespan_state = lifespan_state
        self._store = store
        self._name = name
        self._json_response = json_response
        self._idle_timeout = idle_timeout
        self._sessions: dict[str, Session] = {}
        self._ready: dict[str, anyio.Event] = {}
        self._tasks: anyio.abc.TaskGroup | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Where the sessions' loops live. On the way out calls may go on until the store has drained."""
        unregister = self._store.register(
            App(
                self._deliver,
                self.session_ended,
                self.session_changed,
                self.end_all,
                sessions=lambda: len(self),
            )
        )
        try:
            async with anyio.create_task_group() as group:
                self._tasks = group
                group.start_soon(keep_up, self._store, self._name, self._idle_timeout, self.ids, self.session_ended)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
        finally:
            self._tasks = None
            unregister()

    def __len__(self) -> int:
        return len(self._sessions)

    def has(self, session_id: str) -> bool:
        """Whether the session has an object here that is ready to take a request."""
        return session_id in self._sessions and session_id not in self._ready

    def ids(self) -> set[str]:
        """The sessions that have an object here."""
        return set(self._sessions)

    def open(self, key: SessionKey) -> Session:
        """A new session object, its loop running."""
        if self._tasks is None:
            raise RuntimeError("The app's lifespan has ended")
        session = Session(
            self._server,
            self._lifespan_state,
            self._store.log,
            self._store.hub,
            session_id=key.session_id,
            owner=key.owner,
            worker=self._store.worker_number,
            json_response=self._json_response,
            on_over=self._forget,
        )
        self._sessions[key.session_id] = session
        self._tasks.start_soon(session.run)
        return session

    async def restored(self, key: SessionKey, record: SessionRecord, request: Request) -> Session:
        """The session's object, made from what other workers left, ready to take a request."""
        session = self._sessions.get(key.session_id)
        if session is None:
            ready = self._ready[key.session_id] = anyio.Event()
            try:
                session = self.open(key)
                session.restore(record)
                await session.catch_up(record, request)
            finally:
                ready.set()
                self._ready.pop(key.session_id, None)
        return session

    async def ready(self, session_id: str) -> Session | None:
        """The session's object once it is restored; None when there is none here."""
        if (restoring := self._ready.get(session_id)) is not None:
            await restoring.wait()
        return self._sessions.get(session_id)

    # --- requests -----------------------------------------------------------------------------------------------------

    async def open_stream(self, key: SessionKey, message: JSONRPCRequest, body: bytes) -> Call:
        return await self._store.log.open_stream(
            key,
            request_id=json.dumps(message.id),
            request_key=request_key(message.id),
            method=message.method,
            # Only a look: to wait for a session that is being restored would tell a stranger of it. And to a stranger's
            # request the session is as unknown here as it is elsewhere, so that it takes the same time.
            restore=not (self.has(key.session_id) and self._sessions[key.session_id].owner == key.owner),
        )

    async def start(self, key: SessionKey, call: Call, message: JSONRPCRequest, body: bytes, request: Request) -> None:
        # Asked again: a `restored` elsewhere may have come first.
        session = await self.ready(key.session_id)
        if session is None:
            record = call.record or await self._store.log.find_session(key)
            session = await self.restored(key, record, request)
        elif session.behind(call.told):
            await session.catch_up(await self._store.log.find_session(key), request)
        session.start(message, call.stream, request)

    # --- messages that are not requests -------------------------------------------------------------------------------

    async def route(self, key: SessionKey, message: JSONRPCMessage, body: bytes, request: Request) -> None:
        """Bring a client's answer or notification to the worker that it concerns, before the client gets its 202."""
        log, me = self._store.log, self._store.worker_number()
        record = await log.find_session(key)
        raw = body.decode()
        match message:
            case JSONRPCResponse() | JSONRPCError():
                named = parse_wire_id(message.id)
            case JSONRPCNotification(method="notifications/progress", params=dict() as params):
                named = parse_wire_id(params.get("progressToken"))
            case JSONRPCNotification(method="notifications/cancelled"):
                request_id = cancelled_request_id_from_params(message.params)
                owner = None if request_id is None else await log.call_owner(key.session_id, request_key(request_id))
                named = None if owner is None else (owner, 0, "")
            case _:
                # For the session as a whole: this worker, and every other one that runs something for it.
                others = [worker for worker in await log.session_workers(key.session_id) if worker != me]
                if others:
                    await log.post(others, key.session_id, raw)
                session = await self.ready(key.session_id)
                if session is None:
                    session = await self.restored(key, record, request)
                session.deliver(message, request)
                return
        if named is None:
            logger.info("Session %s: an answer or a cancellation named nothing that runs", key.session_id)
        elif named[0] == me:
            self.receive(key.session_id, message, request)
        elif not await log.post([named[0]], key.session_id, raw):
            logger.info("Session %s: an answer came after the worker that asked was gone", key.session_id)

    def _deliver(self, session_id: str, message: str, stream: Stream | None) -> bool:
        # Requests are run where they land.
        return stream is None and self.receive(session_id, message)

    def receive(self, session_id: str, message: JSONRPCMessage | str, request: Request | None = None) -> bool:
        """A message for something that runs here, from this worker's client or another worker's; False if not ours."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        if isinstance(message, str):
            message = jsonrpc_message_adapter.validate_json(message, by_name=False)
        named = None
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            named = parse_wire_id(message.id)
        elif isinstance(message, JSONRPCNotification) and message.method == "notifications/progress":
            named = parse_wire_id((message.params or {}).get("progressToken"))
        if named is not None and named[1] != session.incarnation:
            logger.info("Session %s: an answer came after what asked for it was gone", session_id)
            return True
        session.deliver(message, request)
        return True

    # --- ends ---------------------------------------------------------------------------------------------------------

    def session_ended(self, session_id: str) -> None:
        """A session ended, here or elsewhere: what runs of it here is cancelled."""
        if (session := self._sessions.pop(session_id, None)) is not None:
            session.end()

    def session_changed(self, session_id: str) -> None:
        """A client told another worker something that the session's object here should know."""
        if (session := self._sessions.get(session_id)) is not None:
            self._store.spawn(self._catch_up(session))

    async def _catch_up(self, session: Session) -> None:
        record = await self._store.log.session_record(session.session_id)
        if record is not None:
            await session.catch_up(record, None)

    def end_all(self) -> None:
        """This worker was declared dead, or shuts down."""
        for session in list(self._sessions.values()):
            session.end()
        self._sessions.clear()

    def _forget(self, session: Session) -> None:
        if self._sessions.get(session.session_id) is session:
            del self._sessions[session.session_id]
