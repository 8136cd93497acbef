"""One stream of the upstream, read here: what comes is stored in a stream of the log, and delivered from there.

When the upstream's connection breaks it is asked to go on after the last event that is stored (`Last-Event-ID`). Where
it cannot, the call ends with an error that says so; where this replica may not ask (its credential has expired), the
stream is left to whoever comes back with a better one. Next: `log.enqueue`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from mcp_types import RequestId
from mcp_types.version import is_version_at_least

from ..backend import SessionKey, Stream
from ..errors import AppendRefused, Error
from ..finals import final_error
from ..ids import request_key
from ..relayed import RelayedSession
from ..session import RESUMABLE_SINCE
from .event_stream import EventStream, EventTooLarge, ServerSentEvent
from .messages import CANCELLED, error_of, message_in
from .upstream import EVENT_STREAM, Reply, Upstream, UpstreamFailed

if TYPE_CHECKING:
    from ..store import PostgresStore

__all__ = ["AT_ONCE", "CANCELLED_GRACE", "Asker", "Relay", "UpstreamSessionGone"]

logger = logging.getLogger(__name__)

RETRY: Final = 0.5
"""How long (seconds) after the end of a connection the upstream is asked again, where it gives no hint."""
RETRY_MAX: Final = 60.0
FUTILE: Final = 5
"""So many connections one after the other that bring nothing at all, and the upstream is taken at its word."""
SILENCE: Final = 30.0
"""After how many silent seconds a resumed connection is made anew: some servers lose what comes while they replay."""
AT_ONCE: Final = 0.1
"""How soon (seconds) an answer comes whose client is given no id before it."""
CANCELLED_GRACE: Final = 5.0
"""How long (seconds) the upstream has for the end of a call that its client has cancelled."""


class UpstreamSessionGone(Exception):
    """The upstream knows the session no more."""


class _Lost(Exception):
    """The upstream cannot go on with the stream; the text says why."""


class _Refused(Exception):
    """The upstream takes the asker's credential no more."""


@dataclass(frozen=True, slots=True)
class Asker:
    """What requests of the upstream are made with, on behalf of a client: kept as long as they are, in memory alone."""

    headers: Mapping[str, str]
    query: bytes


class Relay:
    """One stream and its upstream. `request_id` is None for the standalone stream, which has no final."""

    def __init__(
        self,
        store: PostgresStore,
        upstream: Upstream,
        key: SessionKey,
        session: RelayedSession,
        stream: Stream,
        request_id: RequestId | None,
        asker: Asker,
        *,
        limit: int,
        patience: float,
        last_id: bytes | None = None,
        fresh: bool = True,
    ) -> None:
        self.key = key
        self.stream = stream
        self._store = store
        self._log = store.log
        self._upstream = upstream
        self._session = session
        self._request_id = request_id
        self._wanted = None if request_id is None else request_key(request_id)
        self._asker = asker
        self._limit = limit
        self._patience = patience
        self._last_id = last_id
        self._complete_ids = last_id is not None or fresh
        """Whether what follows the last event that is stored can be asked for, without a double."""
        self._noted: asyncio.Task[None] | None = None
        self._needed = asyncio.Event()
        self._began = asyncio.get_running_loop().time()
        self._retry = RETRY
        self._cancelled = False
        self._ended = False
        self._answered = False
        self._noise = False
        self._futile = 0
        self._reply: Reply | None = None
        self._hung_up = asyncio.Event()
        self._storing = asyncio.Lock()

    @property
    def standalone(self) -> bool:
        """Whether it answers no request."""
        return self._request_id is None

    @property
    def resumable(self) -> bool:
        """Whether another replica could go on with it."""
        return self._request_id is None or (self._last_id is not None and self._complete_ids)

    def answers(self, request_id: RequestId) -> bool:
        """Whether it is the answer to this request."""
        return self._wanted == request_key(request_id)

    def cancelled(self) -> None:
        """Its client has cancelled the call, and the upstream was told: it need not answer (specification,
        2025-11-25, "Cancellation")."""
        if not self._cancelled:
            self._cancelled = True
            self._store.spawn(self._end_cancelled())

    async def _end_cancelled(self) -> None:
        await asyncio.sleep(CANCELLED_GRACE)
        if not self._ended:
            await self._finish("cancelled")
            self.hang_up()

    def hang_up(self) -> None:
        """Read no more."""
        self._ended = True
        self._hung_up.set()
        if self._reply is not None:
            self._reply.close()

    async def settle(self) -> None:
        """Return when nothing of it is on its way into the log, and nothing will be."""
        self.hang_up()
        async with self._storing:
            await self._have_noted()

    # --- reading ------------------------------------------------------------------------------------------------------

    async def run(self, reply: Reply | None) -> None:
        """Read to the end: the answer `reply`, and then whatever the upstream has after it.

        Raises:
            UpstreamSessionGone: the upstream knows the session no more.
            Error: the log takes no more.
        """
        try:
            while not self._ended:
                resumed = reply is None
                if reply is None:
                    reply = await self._ask()
                    if self._hung_up.is_set():
                        # While it was asked; whoever goes on with the stream is to be its only reader.
                        reply.close()
                        break
                await self._read(reply, resumed)
                reply = None
                if not self._ended:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self._retry):
                            await self._hung_up.wait()
        except _Lost as lost:
            if not self._ended:
                logger.warning("Session %s: an answer of the upstream is lost: %s", self.key.session_id, lost)
                await self._finish("upstream_lost")
        except _Refused:
            if not self._ended:
                logger.info("Session %s: the upstream takes a credential no more", self.key.session_id)
                await self._leave()
        except AppendRefused as refused:
            logger.debug("Not stored in stream %d: %s", self.stream.number, refused)
        finally:
            self.hang_up()
            if self._noted is not None and self.stream.closed:
                self._noted.cancel()

    async def _read(self, reply: Reply, resumed: bool) -> None:
        """One connection, to its end."""
        self._reply = reply
        events = EventStream(self._limit)
        clock = asyncio.get_running_loop().time
        futile = True
        try:
            async with asyncio.timeout(SILENCE if resumed else None) as silence:
                async for chunk in reply.chunks():
                    found = events.feed(chunk)
                    if events.retry is not None:
                        self._retry = min(events.retry, RETRY_MAX)
                    if found:
                        futile = False
                        # That the database takes long is no silence of the upstream's.
                        silence.reschedule(None)
                        await self._store_all(found)
                        if resumed:
                            silence.reschedule(clock() + SILENCE)
                    if self._ended:
                        if self._answered:
                            await reply.finish()
                        return
            if not futile:
                await self._mirror_close(events.retry)
        except TimeoutError:
            futile = False
            logger.debug("Session %s: a resumed stream is silent, so it is resumed again", self.key.session_id)
        except EventTooLarge:
            raise _Lost(f"an event is larger than {self._limit} bytes") from None
        except UpstreamFailed as failed:
            logger.debug("Session %s: %s", self.key.session_id, failed)
        finally:
            reply.close()
        if self._cancelled and not self._ended:
            await self._finish("cancelled")
        self._futile = self._futile + 1 if futile else 0
        if self._futile >= FUTILE and self._request_id is not None:
            raise _Lost("it ends connections without a word")

    async def _mirror_close(self, retry: float | None) -> None:
        """The upstream has ended its response before the call is over, and wants to be asked again (SEP-1699): so does
        this proxy, with the same hint, where the client's revision knows of it."""
        if self.standalone or self._cancelled or not self.resumable:
            return
        if is_version_at_least(self._session.protocol_version, RESUMABLE_SINCE):
            hint = None if retry is None else int(retry * 1000)
            if not self._store.hub.end_stream(self.stream.number, "closed", retry=hint):
                await self._log.close_reader(self.stream.number)

    async def _ask(self) -> Reply:
        """A connection that goes on after the last event that is stored. Asked for again where that may help."""
        if self._request_id is not None and (self._last_id is None or not self._complete_ids):
            raise _Lost("its connection broke, and it gave no id to resume from")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._patience
        pause = 0.1
        while True:
            why = ""
            try:
                return await self._ask_once(deadline - loop.time())
            except UpstreamFailed as failed:
                why = str(failed)
            if loop.time() + pause > deadline:
                raise _Lost(why)
            await asyncio.sleep(pause)
            pause = min(2.0, pause * 2)
            if self._ended:
                raise AppendRefused("The stream has ended")

    async def _ask_once(self, timeout: float) -> Reply:
        extra = [("accept", EVENT_STREAM)]
        if self._last_id is not None:
            extra.append(("last-event-id", self._last_id.decode("utf-8", "replace")))
        headers = {name: value for name, value in self._asker.headers.items() if name != "content-type"}
        reply = await self._upstream.request(
            "GET",
            headers,
            query=self._asker.query,
            session_id=self._session.upstream,
            extra=extra,
            timeout=max(0.1, timeout),
        )
        if reply.is_stream and not reply.is_encoded:
            return reply
        reply.close()
        match reply.status:
            case 401 | 403:
                raise _Refused
            case 404:
                raise UpstreamSessionGone
            case 400 if self._request_id is None and self._last_id is not None:
                # What came since is gone. A standalone stream goes on all the same: nobody waits for its end.
                logger.warning("Session %s: the upstream has no more what its stream missed", self.key.session_id)
                self._last_id = None
                raise UpstreamFailed("The upstream knows the event no more")
            case 408 | 409 | 425 | 429:
                # 409: it has not noticed yet that the connection before is gone.
                raise UpstreamFailed(f"The upstream answered {reply.status}")
            case status if status >= 500:
                raise UpstreamFailed(f"The upstream answered {status}")
            case status:
                raise _Lost(f"it answered {status} to a request to resume")

    # --- storing ------------------------------------------------------------------------------------------------------

    async def _store_all(self, events: list[ServerSentEvent]) -> None:
        """Store what came together. Read on when that is committed, so that the upstream is no faster than the log."""
        stored = []
        async with self._storing:
            for event in events:
                if self._ended:
                    break
                payload, final = self._message(event)
                upstream_id = event.cursor
                if payload is None:
                    if upstream_id is not None:
                        await self._note(upstream_id, needed=False)
                    continue
                if upstream_id is None:
                    self._complete_ids = False
                elif not final:
                    await self._note(upstream_id, needed=True)
                stored.append(await self._log.enqueue(self.stream, payload, final=final, upstream_id=upstream_id))
                if final:
                    self._ended = self._answered = True
            for done in stored:
                await done

    async def _note(self, upstream_id: bytes, *, needed: bool) -> None:
        """The id of an event that is stored next, or of one without data. The first in a stream says in the database
        that others can go on with it: before an event may need that, or soon; an answer that comes at once never
        does."""
        first = self._last_id is None
        self._last_id = upstream_id
        self._complete_ids = True
        if first:
            self._noted = asyncio.create_task(self._note_soon(upstream_id))
        if needed:
            await self._have_noted()

    async def _note_soon(self, upstream_id: bytes) -> None:
        with contextlib.suppress(TimeoutError):
            # Before its client knows what to come back for.
            async with asyncio.timeout_at(self._began + AT_ONCE / 2):
                await self._needed.wait()
        try:
            await self._store.relayed.note_id(self.stream, upstream_id)
        except Error as error:
            logger.debug("Stream %d: its first id was not noted: %s", self.stream.number, error)

    async def _have_noted(self) -> None:
        if self._noted is not None and not self._noted.done():
            self._needed.set()
            await asyncio.wait([self._noted])

    def _message(self, event: ServerSentEvent) -> tuple[bytes | None, bool]:
        """The message in an event, and whether it is the answer."""
        if not event.data or event.event != b"message":
            return None, False
        found = message_in(event.data, self._wanted)
        if found is None:
            if not self._noise:
                self._noise = True
                logger.warning(
                    "Session %s: what is no MCP message in the upstream's stream is left out", self.key.session_id
                )
            return None, False
        return found

    async def _finish(self, reason: str) -> None:
        """End the call with an error; the standalone stream is left."""
        if self._request_id is None:
            await self._leave()
            return
        self._ended = True
        error = CANCELLED if reason == "cancelled" else final_error(reason)
        try:
            await self._log.append(self.stream, error_of(self._request_id, error), final=True)
        except AppendRefused as refused:
            logger.debug("Not stored in stream %d: %s", self.stream.number, refused)

    async def fail(self) -> None:
        """It cannot go on for a reason that nobody foresaw."""
        if not self.stream.closed:
            await self._finish("upstream_lost")

    async def _leave(self) -> None:
        """Let others go on with it, and send its reader, if it is here, to come back with what the upstream takes."""
        await self.settle()
        await self._store.relayed.release([self.stream])
        self._store.hub.end_stream(self.stream.number, "closed")
