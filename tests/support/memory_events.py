"""The SDK's example of an event store, in memory."""

from __future__ import annotations

from collections import deque
from uuid import uuid4

from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp_types import JSONRPCMessage

__all__ = ["MemoryEventStore"]


class MemoryEventStore(EventStore):
    """Events in memory, after the SDK's example: the newest 100 of each stream."""

    def __init__(self) -> None:
        self._streams: dict[str, deque[tuple[str, JSONRPCMessage | None]]] = {}
        self._stream_of: dict[str, str] = {}

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        event_id = str(uuid4())
        events = self._streams.setdefault(stream_id, deque(maxlen=100))
        if len(events) == events.maxlen:
            self._stream_of.pop(events[0][0], None)
        events.append((event_id, message))
        self._stream_of[event_id] = stream_id
        return event_id

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        stream_id = self._stream_of.get(last_event_id)
        if stream_id is None:
            return None
        found = False
        for event_id, message in self._streams[stream_id]:
            if found and message is not None:
                await send_callback(EventMessage(message, event_id))
            found = found or event_id == last_event_id
        return stream_id
