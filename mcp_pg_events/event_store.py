"""The SDK's `EventStore` for one session, over the same log, for those who wire their own transport.

Streams have names here (the SDK's: a request's id as a string, `_GET_stream`), and any worker may write to one, so
their numbers come from the database. Next: `log.append`, and `reader`-like reading in `replay_events_after`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCResponse, jsonrpc_message_adapter

from . import sse, telemetry
from .backend import CursorRejected, SessionKey, SessionUnknown, Stream
from .errors import ConfigurationError, Error
from .ids import request_key

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["SessionEventStore"]

POLL_INTERVAL = 5.0


class SessionEventStore(EventStore):
    """One session's events. Made by `PostgresStore.for_session`."""

    def __init__(self, store: PostgresStore, session_id: str) -> None:
        if not session_id or "\0" in session_id:
            raise ConfigurationError("A session id has at least one character and no NUL")
        self._store = store
        self._session_id = session_id
        self._streams: dict[str, Stream] = {}
        self._adopted = False

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        """Store a message (None: nothing, but give a cursor for what follows) and return its event id."""
        log = self._store.log
        stream = self._streams.get(stream_id)
        last_seq = 0
        if stream is None or stream.closed or message is None:
            stream, last_seq = await log.named_stream(
                self._session_id, json.dumps(stream_id), "n" + request_key(stream_id), adopt=not self._adopted
            )
            self._adopted = True
            self._streams[stream_id] = stream
        if message is None:
            return sse.format_event_id(stream.number, last_seq)
        final = isinstance(message, JSONRPCResponse | JSONRPCError) and message.id is not None
        payload = message.model_dump_json(by_alias=True, exclude_unset=True).encode()
        seq = await log.append(stream, payload, final=final)
        if final:
            self._streams.pop(stream_id, None)
        return sse.format_event_id(stream.number, seq)

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Send what follows `last_event_id` in its stream, and go on live until its final response.

        Returns None when the final was sent, so that the SDK ends the response; its own wiring would wait on for ever.

        Raises:
            errors.Error: the id is malformed, unknown in this session, or has expired.
        """
        cursor = sse.parse_event_id(last_event_id)
        if cursor is None:
            telemetry.resumed("malformed")
            raise Error("The event id is malformed: it is none of the ids that this store gives")
        log, hub = self._store.log, self._store.hub
        key = SessionKey(self._session_id, "", None, None)
        try:
            held = await log.attach(key, cursor[0], cursor[1], patience=self._store.outage_timeout)
        except SessionUnknown:
            raise Error("The event id is unknown in this session") from None
        except CursorRejected as rejected:
            telemetry.resumed(rejected.reason)
            raise Error(f"The event id is {rejected.reason} in this session") from None
        subscription = hub.subscribe(held.stream, self._session_id, held.generation)
        replay = telemetry.Replay()
        position, bound = held.position, held.bound
        try:
            while subscription.end_reason is None:
                subscription.take()
                subscription.behind = False
                page = await log.read(held.stream, position, bound)
                if page.generation > subscription.generation:
                    return None
                if page.expired:
                    raise Error("The event id has expired in this session")
                for event in page.events:
                    message = jsonrpc_message_adapter.validate_json(event.payload, by_name=False)
                    await send_callback(EventMessage(message, sse.format_event_id(held.stream, event.seq)))
                    position, bound = event.seq, log.bound_after(event)
                replay.events += len(page.events)
                if page.ended:
                    return None
                if not page.more:
                    replay.over()
                    await subscription.wait(POLL_INTERVAL)
            return None
        finally:
            replay.over()
            hub.unsubscribe(subscription)
            self._store.spawn(log.detach(held.stream, held.generation, position))
