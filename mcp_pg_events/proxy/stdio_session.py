"""One session before a program on stdio: the requests that it works on, and what of its output belongs to which.

The program's answers end the streams of their requests, and its progress goes by its token. Of everything else that it
writes stdio does not say what it is about: it goes into the stream of the newest request that is open, since its client
reads that one for sure, and into the standalone stream where none is open. So a question to the client in the middle of
a call reaches also a client that has no standalone stream. Next: `log.enqueue`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Final

from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp_types import (
    CONNECTION_CLOSED,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
)
from starlette.requests import Request

from ..backend import SessionKey, Stream
from ..errors import AppendRefused, Error
from ..ids import request_key
from ..log import Log
from ..session import REQUEST_CANCELLED
from .messages import Written, answer, error, one_line, read_line
from .process import Command, Keeper, ServerProcess

__all__ = ["ProcessSession"]

logger = logging.getLogger(__name__)

_BUSY: Final = "The server's process does not read its input, and too much waits for it already"


@dataclass(slots=True, eq=False)
class _Call:
    """A request in progress; `initialize` has no stream yet, so what belongs to it is kept."""

    request_id: RequestId
    stream: Stream | None
    token: str | None
    kept: list[JSONRPCMessage] = field(default_factory=list)


class ProcessSession:
    """A session and its program. `on_died` is called when the program has ended by itself, `on_quiet` when the last
    open request has its answer."""

    def __init__(
        self,
        key: SessionKey,
        command: Command,
        keeper: Keeper,
        log: Log,
        *,
        start_timeout: float,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        on_died: Callable[[ProcessSession], None],
        on_quiet: Callable[[ProcessSession], None],
    ) -> None:
        self.key = key
        self._log = log
        self._spawn = spawn
        self._start_timeout = start_timeout
        self._on_died = on_died
        self._on_quiet = on_quiet
        self._calls: dict[str, _Call] = {}
        self._tokens: dict[str, _Call] = {}
        self._standalone: Stream | None = None
        self._settled = asyncio.Event()
        """`initialize` has its answer, or never will."""
        self._opened = asyncio.Event()
        self._ended: str | None = None
        self._over = False
        self._noise = False
        self._process = ServerProcess(command, keeper, key.session_id, on_lines=self._take, on_exit=self._exited)

    @property
    def busy(self) -> bool:
        """Whether a request is open, or the session about to begin."""
        return bool(self._calls) or self._standalone is None

    @property
    def standalone(self) -> Stream | None:
        """The stream for what belongs to no request, once the session is recorded."""
        return self._standalone

    @standalone.setter
    def standalone(self, stream: Stream | None) -> None:
        self._standalone = stream
        self._opened.set()
        if self._ended is not None and not self._over:
            # With the answer to `initialize` on its lips.
            self._on_died(self)

    # --- life ---------------------------------------------------------------------------------------------------------

    async def initialize(self, message: JSONRPCRequest, body: bytes, request: Request) -> list[JSONRPCMessage]:
        """Start the program and run its first request: what it sent before its answer, and the answer."""
        call = self._calls[request_key(message.id)] = _Call(message.id, None, None)
        try:
            await self._process.start()
        except OSError as failure:
            logger.error("Session %s: its program could not be started: %s", self.key.session_id, failure.strerror)
            return [error(message.id, CONNECTION_CLOSED, "The server's process could not be started").message]
        if self._over:
            await self._process.end()
            return []
        self._process.write(one_line(body))
        try:
            async with asyncio.timeout(self._start_timeout):
                await self._settled.wait()
        except TimeoutError:
            logger.error(
                "Session %s: its program did not answer initialize within %s s",
                self.key.session_id,
                self._start_timeout,
            )
            text = f"The server's process did not answer within {self._start_timeout:g} seconds"
            return [error(message.id, CONNECTION_CLOSED, text, "process_lost").message]
        if self._ended is not None and not call.kept:
            text = f"The server's process {self._ended} before it had answered; the proxy's log has what it said"
            return [error(message.id, CONNECTION_CLOSED, text, "process_lost").message]
        return call.kept

    async def end(self) -> None:
        """The session is over. Finals are somebody else's by then; this returns when the program is gone."""
        self._over = True
        self._settled.set()
        await self._process.end()

    def _exited(self, how: str) -> None:
        self._ended = how
        established = self._standalone is not None
        logger.warning("Session %s: its program %s", self.key.session_id, how)
        self._settled.set()
        if established and not self._over:
            self._on_died(self)

    # --- in -----------------------------------------------------------------------------------------------------------

    def start(self, message: JSONRPCRequest, stream: Stream, body: bytes) -> None:
        """Give the program a request whose stream is open."""
        meta = (message.params or {}).get("_meta")
        token = _token(meta.get("progressToken")) if isinstance(meta, dict) else None
        key = request_key(message.id)
        call = self._calls[key] = _Call(message.id, stream, token)
        if token is not None:
            self._tokens[token] = call
        stream.on_ended = lambda: self._abandon(key, call)
        if stream.ended:
            # While it was on its way here: its DELETE, say.
            self._forget(key, call)
        elif not self._process.write(one_line(body)):
            self._forget(key, call)
            logger.warning("Session %s: a request was refused, since its program reads nothing", self.key.session_id)
            self._spawn(self._finish(stream, error(message.id, CONNECTION_CLOSED, _BUSY, "process_busy")))

    def deliver(self, message: JSONRPCMessage, body: bytes) -> None:
        """Give the program a notification, or the answer to a request of its own."""
        if not self._process.write(one_line(body)):
            logger.warning("Session %s: a message was dropped, since its program reads nothing", self.key.session_id)
        if isinstance(message, JSONRPCNotification) and message.method == "notifications/cancelled":
            request_id = cancelled_request_id_from_params(message.params)
            key = None if request_id is None else request_key(request_id)
            if key is not None and (call := self._calls.get(key)) is not None and call.stream is not None:
                # It need not answer (specification, 2025-11-25, "Cancellation"), and what it answers comes too late.
                self._forget(key, call)
                cancelled = error(call.request_id, REQUEST_CANCELLED, "Request cancelled")
                self._spawn(self._finish(call.stream, cancelled))

    def _abandon(self, key: str, call: _Call) -> None:
        """Somebody else wrote the call's final; the program is told as by a client's cancellation."""
        if self._forget(key, call):
            params = {"requestId": call.request_id, "reason": "the request has ended"}
            cancelled = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": params}
            self._process.write(json.dumps(cancelled).encode())
            self._look_quiet()

    def _forget(self, key: str, call: _Call) -> bool:
        """Nothing more belongs to the call; False when that was so already."""
        if self._calls.get(key) is not call:
            return False
        del self._calls[key]
        if call.token is not None and self._tokens.get(call.token) is call:
            del self._tokens[call.token]
        return True

    def _look_quiet(self) -> None:
        if not self.busy:
            self._on_quiet(self)

    async def _finish(self, stream: Stream, written: Written) -> None:
        try:
            await self._log.append(stream, written.payload, final=True)
        except AppendRefused as refused:
            logger.debug("Not stored in stream %d: %s", stream.number, refused)
        except Error as failure:
            logger.error("Session %s: an error could not be stored: %s", self.key.session_id, failure)
        self._look_quiet()

    # --- out ----------------------------------------------------------------------------------------------------------

    async def _take(self, lines: list[bytes]) -> None:
        """Store what the program wrote. It is read on when that is committed, so it writes no faster than the log."""
        stored = []
        try:
            for line in lines:
                written = read_line(line)
                if written is None:
                    self._note_noise(line)
                    continue
                if (place := await self._place(written)) is not None:
                    stream, payload, final = place
                    try:
                        stored.append(await self._log.enqueue(stream, payload, final=final))
                    except AppendRefused as refused:
                        logger.debug("Not stored in stream %d: %s", stream.number, refused)
            for event in stored:
                try:
                    await event
                except AppendRefused as refused:
                    logger.debug("Not stored: %s", refused)
            self._look_quiet()
        except Error as failure:
            # This worker lost its number or its database for too long: its sessions end with that.
            if not self._over:
                logger.error("Session %s: what its program wrote could not be stored: %s", self.key.session_id, failure)

    async def _place(self, written: Written) -> tuple[Stream, bytes, bool] | None:
        """The stream that a message belongs to, and whether that ends with it; None where it is dropped or kept."""
        message = written.message
        if isinstance(message, JSONRPCResponse | JSONRPCError):
            key = "" if message.id is None else request_key(message.id)
            call = self._calls.get(key)
            if call is None:
                logger.debug("Session %s: dropped an answer whose request has ended", self.key.session_id)
                return None
            written = answer(written, call.request_id)
            # Gone before the final is visible: the id may be used again from then on.
            if call.stream is None:
                del self._calls[key]
                call.kept.append(written.message)
                self._settled.set()
                # What comes next needs the session's streams.
                await self._opened.wait()
                return None
            self._forget(key, call)
            return call.stream, written.payload, True
        call = None
        if isinstance(message, JSONRPCNotification) and message.method == "notifications/progress":
            call = self._tokens.get(_token((message.params or {}).get("progressToken")) or "")
        if call is None and self._calls:
            call = next(reversed(self._calls.values()))
        if call is None:
            assert self._standalone is not None
            return self._standalone, written.payload, False
        if call.stream is None:
            call.kept.append(message)
            return None
        return call.stream, written.payload, False

    def _note_noise(self, line: bytes) -> None:
        if line.strip() and not self._noise:
            self._noise = True
            logger.warning(
                "Session %s: its program writes to its standard output what is no MCP message; such lines are ignored",
                self.key.session_id,
            )


def _token(token: object) -> str | None:
    """A progress token as a key: 1 is not "1"."""
    return json.dumps(token) if isinstance(token, str | int) and not isinstance(token, bool) else None
