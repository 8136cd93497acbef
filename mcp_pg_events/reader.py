"""One SSE response: a reader of the log, from its history into its present.

The first answer to a POST, a resumed GET and the standalone GET are all this. The reader knows its position; what comes
live from the hub continues there, or else it reads the log. There is no hand-over between the two to get wrong.
Next: the ASGI server, and the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import anyio
from starlette.types import Receive, Send

from . import sse, telemetry
from .backend import Event, EventLog
from .errors import Error
from .hub import Subscription

__all__ = ["ReaderOptions", "SSEReader", "read_final"]

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT: Final = 0.5
"""How long a response that is to end may hang in a send to a client that takes nothing, in seconds."""


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """How responses behave: seconds, but `retry` (the client's reconnection time), which is milliseconds."""

    keep_alive: float = 15.0
    poll_interval: float = 5.0
    outage_timeout: float = 60.0
    retry: int | None = None


class SSEReader:
    """Writes one stream to one connection from `position` on, until its final, its end, or the client's going.

    `primes` says that the client's protocol version knows events without data (2025-11-25 and later).
    """

    def __init__(
        self,
        log: EventLog,
        subscription: Subscription,
        *,
        position: int,
        bound: datetime,
        primes: bool,
        options: ReaderOptions,
        replay: telemetry.Replay | None = None,
    ) -> None:
        self._log = log
        self._replay = replay
        self._subscription = subscription
        self._stream = subscription.stream
        self._primes = primes
        self._options = options
        self._bound = bound
        self._failing_since: float | None = None
        self.position = position
        self.complete = False
        """The final was written, or there is nothing left to come: no reader has to be forgotten."""

    async def respond(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Send the whole response. Returns when it has ended, whoever ended it."""
        end = {"type": "http.response.body", "body": b"", "more_body": False}
        started = ended = False
        async with anyio.create_task_group() as group:
            scope = group.cancel_scope

            def hurry() -> None:
                # A client that takes nothing leaves this blocked in a send; its successor does not wait for it.
                scope.deadline = min(scope.deadline, anyio.current_time() + CLOSE_TIMEOUT)

            self._subscription.on_end = hurry
            if self._subscription.end_reason is not None:
                hurry()
            group.start_soon(_wait_for_disconnect, receive, scope)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            started = True
            if self._primes:
                await self._send(send, sse.priming_frame(self._stream, self.position, self._options.retry))
            else:
                await self._send(send, b"")
            await self._write(send)
            await send(end)
            ended = True
            scope.cancel()
        if started and not ended:
            # Cut short, perhaps only since this worker is busy: a clean end, where the client takes it at once.
            with anyio.move_on_after(0, shield=True):
                await send(end)

    async def _write(self, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        subscription, options = self._subscription, self._options
        last_sent = last_read = clock()
        while True:
            if subscription.end_reason is not None:
                self.complete = subscription.end_reason == "superseded"
                if self._primes and not self.complete:
                    # The cursor and the hint once more, for whom the server sends away.
                    retry = options.retry if subscription.retry is None else subscription.retry
                    await self._send(send, sse.priming_frame(self._stream, self.position, retry))
                return
            if subscription.behind:
                last_read = clock()
                events, ended = await self._read()
            else:
                events = [event for event in subscription.take() if event.seq > self.position]
                if any(event.seq != self.position + place for place, event in enumerate(events, 1)):
                    # In between came what another worker wrote into a shared stream.
                    subscription.behind = True
                    continue
                ended = bool(events) and events[-1].final
            if events:
                await self._send(send, b"".join(sse.frame(self._stream, e.seq, e.payload) for e in events))
                self.position, self._bound = events[-1].seq, max(self._bound, self._log.bound_after(events[-1]))
                last_sent = clock()
                subscription.gave_id()
                if self._replay is None:
                    telemetry.delivered(last_sent - events[0].since)
                else:
                    self._replay.events += len(events)
            if self._replay is not None and not subscription.behind:
                self._replay.over()
                self._replay = None
            if ended:
                self.complete = True
                return
            if events or (subscription.behind and self._failing_since is None):
                continue
            now = clock()
            if now - last_sent >= options.keep_alive:
                await self._send(send, sse.KEEP_ALIVE)
                last_sent = now
            if self._failing_since is not None:
                await asyncio.sleep(0.25)
                continue
            due = min(last_sent + options.keep_alive, last_read + options.poll_interval)
            await subscription.wait(max(0.01, due - now))
            if clock() - last_read >= options.poll_interval:
                # A notification may have been lost; whatever it was about is in the log.
                subscription.behind = True

    async def _read(self) -> tuple[Sequence[Event], bool]:
        """What the log has after the position, and whether the response ends with it."""
        subscription = self._subscription
        # Before the read: what arrives during it is a reason to read again.
        subscription.behind = False
        try:
            page = await self._log.read(self._stream, self.position, self._bound)
        except Error as error:
            now = asyncio.get_running_loop().time()
            subscription.behind = True
            if self._failing_since is None:
                self._failing_since = now
            elif now - self._failing_since > self._options.outage_timeout:
                logger.warning("A response ends since the log cannot be read: %s", error)
                subscription.end("ended")
            return (), False
        self._failing_since = None
        if page.generation > subscription.generation:
            subscription.end("superseded")
            return (), False
        if page.expired:
            # Events between the position and the next one are gone: the client is told when it comes back.
            subscription.end("ended")
            return (), False
        if page.more:
            subscription.behind = True
        return page.events, page.ended

    async def _send(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def read_final(
    subscription: Subscription, log: EventLog, stream_bound: datetime, outage_timeout: float
) -> bytes | None:
    """The payload of the stream's final, for an answer in JSON; None when the session ended without one.

    Raises:
        errors.Error: the log could not be read for `outage_timeout` seconds.
    """
    clock = asyncio.get_running_loop().time
    position = 0
    last_read = clock()
    while True:
        if subscription.end_reason is not None:
            return None
        if subscription.behind:
            subscription.behind = False
            try:
                page = await log.read(subscription.stream, position, stream_bound)
            except Error:
                if clock() - last_read > outage_timeout:
                    raise
                subscription.behind = True
                await asyncio.sleep(0.25)
                continue
            last_read = clock()
            events, ended = page.events, page.ended
        else:
            events, ended = subscription.take(), False
        for event in events:
            position = event.seq
            if event.final:
                return event.payload
        if ended:
            return None
        if not await subscription.wait(5.0):
            subscription.behind = True


async def _wait_for_disconnect(receive: Receive, scope: anyio.CancelScope) -> None:
    # Neither the server's `send` nor its flow control says that the client went.
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
