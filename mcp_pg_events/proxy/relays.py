"""What this replica reads from the upstream, and what it would go on with.

A client that resumes a stream here waits for it with its credential in hand: should the replica that reads the stream
from the upstream be gone, this one claims it and goes on. Next: `relay.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Final

import anyio
from mcp.shared.jsonrpc_dispatcher import cancelled_request_id_from_params
from mcp_types import JSONRPCMessage, JSONRPCNotification, RequestId, jsonrpc_message_adapter

from .. import tasks
from ..backend import App, SessionKey, SessionUnknown, Stream
from ..errors import AppendRefused, Error
from ..finals import final_error
from ..ids import request_key
from ..relayed import Claim, RelayedSession
from ..upkeep import keep_up
from .messages import error_of
from .relay import CANCELLED_GRACE, Asker, Relay, UpstreamSessionGone
from .upstream import Reply, Upstream

if TYPE_CHECKING:
    from ..store import PostgresStore

__all__ = ["Relays"]

logger = logging.getLogger(__name__)

WATCH_INTERVAL: Final = 0.5
OVERDUE_INTERVAL: Final = 15.0
LINGER: Final = 30.0
"""After how long (seconds) without a client a standalone stream is read no more; twice that at most."""
KNOWN: Final = 10_000
"""How many sessions are kept in mind; those that are not are looked up again."""


class Relays:
    """The relays of one endpoint on this replica. Times in seconds.

    `patience` is how long an upstream that does not answer is asked again, `adrift_timeout` how long a call waits for a
    client to come back for it, once the replica that read it is gone.
    """

    def __init__(
        self,
        store: PostgresStore,
        upstream: Upstream,
        *,
        name: str,
        idle_timeout: float | None,
        limit: int,
        patience: float,
        adrift_timeout: float,
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._name = name
        self._idle_timeout = idle_timeout
        self._limit = limit
        self._patience = patience
        self._adrift_timeout = adrift_timeout
        self._relays: dict[int, Relay] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[int, list[tuple[SessionKey, RelayedSession, Asker]]] = {}
        self._claiming: set[int] = set()
        self._asking: dict[tuple[str, str], anyio.CancelScope] = {}
        self._known: dict[str, RelayedSession] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """On the way out nothing is read any more."""
        unregister = self._store.register(
            App(
                self._receive,
                self.session_ended,
                lambda session_id: None,
                self._end_all,
                self._drain,
                sessions=lambda: len(self._known),
            )
        )
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(
                    keep_up, self._store, self._name, self._idle_timeout, lambda: set(self._known), self.session_ended
                )
                group.start_soon(self._watch)
                group.start_soon(self._end_overdue)
                group.start_soon(self._leave_unread)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
        finally:
            await tasks.end(*self._tasks)
            unregister()

    def ids(self) -> set[str]:
        """The sessions that something is read of here."""
        return {relay.key.session_id for relay in self._relays.values()}

    # --- sessions -----------------------------------------------------------------------------------------------------

    async def find(self, key: SessionKey) -> RelayedSession:
        """What is known of a session. Raises `SessionUnknown`."""
        known = self._known.get(key.session_id)
        if known is None:
            known = self._known[key.session_id] = await self._store.relayed.find(key)
            if len(self._known) > KNOWN:
                del self._known[next(iter(self._known))]
        return known

    def session_ended(self, session_id: str) -> None:
        """A session ended, here or elsewhere: nothing of it is read any more."""
        self._known.pop(session_id, None)
        for relay in list(self._relays.values()):
            if relay.key.session_id == session_id:
                relay.hang_up()

    async def upstream_session_gone(self, key: SessionKey) -> None:
        """The upstream knows a session no more, so that it ends."""
        logger.info("Session %s ends, since the upstream knows it no more", key.session_id)
        try:
            await self._store.log.end_session(key, "session_ended")
        except SessionUnknown:
            pass

    def _end_all(self) -> None:
        """This worker was declared dead, or shuts down."""
        for relay in list(self._relays.values()):
            relay.hang_up()

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(
        self,
        key: SessionKey,
        session: RelayedSession,
        stream: Stream,
        request_id: RequestId | None,
        asker: Asker,
        reply: Reply | None,
        claim: Claim | None = None,
    ) -> Relay:
        """Read the upstream's answer into a stream of this worker's, for as long as it takes."""
        relay = Relay(
            self._store,
            self._upstream,
            key,
            session,
            stream,
            request_id,
            asker,
            limit=self._limit,
            patience=self._patience,
            last_id=None if claim is None else claim.last_id,
            fresh=claim is None or claim.fresh,
        )
        self._relays[stream.number] = relay
        stream.on_ended = relay.hang_up
        if stream.ended:
            relay.hang_up()
        task = asyncio.create_task(self._run(relay, reply), name="mcp_pg_events.relay")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return relay

    async def _run(self, relay: Relay, reply: Reply | None) -> None:
        try:
            await relay.run(reply)
        except UpstreamSessionGone:
            await self.upstream_session_gone(relay.key)
        except Error as error:
            # This worker lost its number, or its database for too long: its calls end with that.
            logger.error("Session %s: the upstream's answer cannot be stored: %s", relay.key.session_id, error)
        except Exception:
            logger.exception("Session %s: an answer of the upstream could not be read", relay.key.session_id)
            self._store.spawn(relay.fail())
        finally:
            if reply is not None:
                reply.close()
            if self._relays.get(relay.stream.number) is relay:
                del self._relays[relay.stream.number]

    def reads(self, number: int) -> bool:
        """Whether this replica reads a stream from the upstream."""
        return number in self._relays

    # --- going on where another replica stopped -----------------------------------------------------------------------

    @contextmanager
    def waiting(self, key: SessionKey, session: RelayedSession, number: int, asker: Asker) -> Iterator[None]:
        """While a client reads a stream here, this replica would go on with it in the client's name."""
        mine = (key, session, asker)
        # A list, since anybody may name any stream: one that is no business of theirs takes nobody's place.
        waiting = self._waiting.setdefault(number, [])
        waiting.append(mine)
        try:
            yield
        finally:
            # By identity: two requests may well be equal.
            del waiting[next(place for place, each in enumerate(waiting) if each is mine)]
            if not waiting:
                del self._waiting[number]

    async def take_over(self, number: int) -> None:
        """Claim a stream that a client waits for here, if nobody reads it from the upstream. The newest comes first."""
        if number in self._claiming or self._store.draining:
            return
        self._claiming.add(number)
        try:
            for key, session, asker in self._waiting.get(number, [])[::-1]:
                if number in self._relays:
                    return
                claim = await self._store.relayed.claim(key, number)
                if claim is not None:
                    logger.info("Session %s: this replica goes on with stream %d", key.session_id, number)
                    self.read(key, session, claim.stream, claim.request_id, asker, None, claim)
                    return
        finally:
            self._claiming.discard(number)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            watched = [number for number in self._waiting if number not in self._relays]
            try:
                await self._store.relayed.release_doubtful()
                if not watched or self._store.draining:
                    continue
                for number in await self._store.relayed.adrift(watched):
                    await self.take_over(number)
            except Error as error:
                logger.debug("Streams that nobody reads cannot be found for now: %s", error)

    async def _leave_unread(self) -> None:
        """A standalone stream has no end of its own: the upstream is asked for it only while a client listens."""
        unread: set[int] = set()
        while True:
            await asyncio.sleep(LINGER)
            standalone = {number: relay for number, relay in self._relays.items() if relay.standalone}
            try:
                # What comes between its look and the release finds nobody reading, and claims the stream anew.
                before, unread = unread, await self._store.relayed.unread(standalone) if standalone else set()
                await self._release([standalone[number] for number in before & unread])
            except Error as error:
                logger.debug("Streams that no client reads cannot be found for now: %s", error)

    async def _end_overdue(self) -> None:
        """Calls that no client came back for in a long time end with an error, so that nothing stays open for ever."""
        while True:
            await asyncio.sleep(min(OVERDUE_INTERVAL, self._adrift_timeout))
            try:
                for number, session_id in await self._store.relayed.overdue(self._name, self._adrift_timeout):
                    if number in self._waiting:
                        continue
                    key = SessionKey(session_id, self._name, None, self._idle_timeout)
                    claim = await self._store.relayed.claim(key, number)
                    if claim is not None:
                        await self._lose(claim)
            except Error as error:
                logger.debug("Calls that nobody reads could not be ended: %s", error)

    async def _lose(self, claim: Claim) -> None:
        assert claim.request_id is not None
        try:
            await self._store.log.append(
                claim.stream, error_of(claim.request_id, final_error("upstream_lost")), final=True
            )
        except AppendRefused as refused:
            logger.debug("Stream %d has ended already: %s", claim.stream.number, refused)

    # --- going --------------------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        """What the upstream would resume is left to other replicas at once; the other calls may finish."""
        self._store.spawn(self._release([relay for relay in self._relays.values() if relay.resumable]))

    async def _release(self, relays: list[Relay]) -> None:
        if not relays:
            return
        await asyncio.gather(*(relay.settle() for relay in relays))
        await self._store.relayed.release([relay.stream for relay in relays if not relay.stream.closed])

    # --- cancellations ------------------------------------------------------------------------------------------------

    async def cancelled(self, key: SessionKey, message: JSONRPCMessage) -> None:
        """The upstream took a client's cancellation: whoever reads the call's answer expects its end."""
        if not isinstance(message, JSONRPCNotification) or message.method != "notifications/cancelled":
            return
        request_id = cancelled_request_id_from_params(message.params)
        if request_id is None:
            return
        owner = await self._store.log.call_owner(key.session_id, request_key(request_id))
        if owner == self._store.worker_number():
            self._cancel(key.session_id, request_id)
        elif owner is not None:
            raw = message.model_dump_json(by_alias=True, exclude_unset=True)
            await self._store.log.post([owner], key.session_id, raw)

    def _receive(self, session_id: str, payload: str, stream: Stream | None) -> bool:
        """A cancellation that another replica passed to the upstream."""
        message = jsonrpc_message_adapter.validate_json(payload, by_name=False)
        request_id = (
            cancelled_request_id_from_params(message.params) if isinstance(message, JSONRPCNotification) else None
        )
        return request_id is not None and self._cancel(session_id, request_id)

    @contextmanager
    def asking(self, key: SessionKey, stream: Stream, request_id: RequestId) -> Iterator[anyio.CancelScope]:
        """While the upstream has not answered a request: a cancellation of it ends the block after a while, and at once
        the end of its stream, which somebody else wrote."""
        asked = key.session_id, request_key(request_id)
        with anyio.CancelScope() as scope:
            stream.on_ended = scope.cancel
            if stream.ended:
                scope.cancel()
            self._asking[asked] = scope
            try:
                yield scope
            finally:
                stream.on_ended = None
                # The id of a stream that ended elsewhere may be in use again.
                if self._asking.get(asked) is scope:
                    del self._asking[asked]

    def _cancel(self, session_id: str, request_id: RequestId) -> bool:
        if (scope := self._asking.get((session_id, request_key(request_id)))) is not None:
            scope.deadline = min(scope.deadline, anyio.current_time() + CANCELLED_GRACE)
            return True
        for relay in self._relays.values():
            if relay.key.session_id == session_id and relay.answers(request_id):
                relay.cancelled()
                return True
        return False
