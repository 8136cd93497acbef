"""The sessions whose programs run on this replica: `backend.Runners` over processes.

A session's program cannot be made again elsewhere, so the session lives here and ends with this worker (`bound.py`).
Next: `stdio_session.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
from mcp_types import JSONRPCMessage, JSONRPCRequest, jsonrpc_message_adapter
from starlette.requests import Request

from ..backend import App, Call, SessionKey, SessionLimit, SessionUnknown, Stream
from ..errors import Error
from ..finals import final_error
from ..upkeep import keep_up
from .process import Command, Keeper
from .stdio_session import ProcessSession

if TYPE_CHECKING:
    from ..store import PostgresStore

__all__ = ["ProcessSessions"]

logger = logging.getLogger(__name__)


class ProcessSessions:
    """Session objects by id, at most `max_processes` of them with those whose program is on its way out."""

    bound = True

    def __init__(
        self,
        command: Command,
        store: PostgresStore,
        *,
        name: str,
        max_processes: int,
        idle_timeout: float | None,
        start_timeout: float,
    ) -> None:
        self._command = command
        self._store = store
        self._name = name
        self._max_processes = max_processes
        self._idle_timeout = idle_timeout
        self._start_timeout = start_timeout
        self._keeper = Keeper()
        self._sessions: dict[str, ProcessSession] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._retired: set[str] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """On the way out every program is ended, all at once."""
        unregister = self._store.register(
            App(self._receive, self.session_ended, lambda session_id: None, self.end_all, self._drain)
        )
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(keep_up, self._store, self._name, self._idle_timeout, self.ids, self.session_ended)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
        finally:
            self.end_all()
            while self._ending:
                await asyncio.wait(self._ending)
            await self._keeper.stop()
            unregister()

    def ids(self) -> set[str]:
        """The sessions whose program runs here; not those that are about to begin, which may take long, since nobody
        else knows them yet."""
        return {session_id for session_id, session in self._sessions.items() if session.standalone is not None}

    def open(self, key: SessionKey) -> ProcessSession:
        if len(self._sessions) + len(self._ending) >= self._max_processes:
            raise SessionLimit(f"{self._max_processes} programs run on this replica already")
        session = ProcessSession(
            key,
            self._command,
            self._keeper,
            self._store.log,
            start_timeout=self._start_timeout,
            spawn=self._store.spawn,
            on_died=lambda session: self._retire(session, "process_lost"),
            on_quiet=self._quiet,
        )
        self._sessions[key.session_id] = session
        return session

    # --- messages -----------------------------------------------------------------------------------------------------

    async def open_stream(self, key: SessionKey, message: JSONRPCRequest, body: bytes) -> Call:
        return await self._store.bound.open_stream(key, message, None if key.session_id in self._sessions else body)

    async def start(self, key: SessionKey, call: Call, message: JSONRPCRequest, body: bytes, request: Request) -> None:
        if call.elsewhere:
            return
        if call.letters:
            await self._store.bound.collect()
        session = self._sessions.get(key.session_id)
        if session is not None:
            session.start(message, call.stream, body)
            return
        # It has just ended; whoever ends it in the log may have done so before this stream was there.
        error = {"jsonrpc": "2.0", "id": message.id, "error": final_error("session_ended")}
        self._store.spawn(self._store.log.append(call.stream, json.dumps(error).encode(), final=True))

    async def route(self, key: SessionKey, message: JSONRPCMessage, body: bytes, request: Request) -> None:
        owner = await self._store.bound.owner(key)
        if owner != self._store.worker_number():
            await self._store.bound.post(owner, key.session_id, body)
        elif (session := self._sessions.get(key.session_id)) is not None:
            session.deliver(message, body)
        else:
            raise SessionUnknown

    def _receive(self, session_id: str, payload: str, stream: Stream | None) -> bool:
        """A message that landed on another replica; with a stream it is a request."""
        session = self._sessions.get(session_id)
        if session is None:
            return False
        message = jsonrpc_message_adapter.validate_json(payload, by_name=False)
        if stream is None:
            session.deliver(message, payload.encode())
        else:
            assert isinstance(message, JSONRPCRequest)
            session.start(message, stream, payload.encode())
        return True

    # --- ends ---------------------------------------------------------------------------------------------------------

    def session_ended(self, session_id: str) -> None:
        """A session ended, here or elsewhere: its program is told to."""
        if (session := self._sessions.pop(session_id, None)) is not None:
            task = asyncio.create_task(self._end(session), name="mcp_pg_events.end_program")
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _end(self, session: ProcessSession) -> None:
        try:
            await session.end()
        except Exception:
            logger.exception("Session %s: its program could not be ended", session.key.session_id)

    def end_all(self) -> None:
        """This worker was declared dead, or shuts down."""
        for session_id in list(self._sessions):
            self.session_ended(session_id)

    def _drain(self) -> None:
        for session in list(self._sessions.values()):
            self._quiet(session)

    def _quiet(self, session: ProcessSession) -> None:
        """Sessions end with this worker; on its way out those end first that nobody waits for."""
        if self._store.draining and not session.busy:
            self._retire(session, "shutdown")

    def _retire(self, session: ProcessSession, reason: str) -> None:
        """End a session for a reason of this replica's. Its open calls get their error with it."""
        if session.key.session_id not in self._retired:
            self._retired.add(session.key.session_id)
            self._store.spawn(self._end_in_log(session.key, reason))

    async def _end_in_log(self, key: SessionKey, reason: str) -> None:
        try:
            while key.session_id in self._sessions:
                try:
                    await self._store.log.end_session(key, reason)
                    return
                except SessionUnknown:
                    # Deleted, or idle, in the same moment.
                    return
                except Error as error:
                    logger.warning("Session %s could not be ended yet: %s", key.session_id, error)
                    await asyncio.sleep(1)
        finally:
            self._retired.discard(key.session_id)
            self.session_ended(key.session_id)
