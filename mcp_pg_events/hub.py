"""Stream → its reader on this worker.

The writer publishes here after each commit, the listener wakes from here what another worker committed, and a newer
reader's attachment ends the older one from here. A reader that falls behind loses its live events, not its place: it
goes back to the log. Next: `reader.py` turns what arrives here into SSE.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

from .backend import Event

__all__ = ["EndReason", "Hub", "Subscription"]

EndReason = Literal["superseded", "closed", "drained", "ended"]
"""Why the server ends a response: a newer reader, `close_sse_stream()`, a worker that drains, a session that ended."""

BUFFER_BYTES: Final = 256 * 1024
"""What a subscription holds for a slow client; beyond it the log holds it."""


class Subscription:
    """One reader's live events, in order, or the note that there is something to read. A response that its client
    cannot resume (one in JSON, or one that gave an old client no id yet) stays when the worker drains."""

    __slots__ = (
        "_bytes",
        "_changed",
        "_postponed",
        "behind",
        "end_reason",
        "events",
        "generation",
        "on_end",
        "resumable",
        "retry",
        "session_id",
        "stream",
    )

    def __init__(self, stream: int, session_id: str, generation: int, resumable: bool = True) -> None:
        self.stream = stream
        self.session_id = session_id
        self.generation = generation
        self.resumable = resumable
        self.events: deque[Event] = deque()
        self.behind = False
        self.end_reason: EndReason | None = None
        self.on_end: Callable[[], None] | None = None
        self.retry: int | None = None
        """The reconnection time (milliseconds) that its client is told at the end, where that is another than usual."""
        self._bytes = 0
        self._changed: asyncio.Future[None] | None = None
        self._postponed = False

    def offer(self, event: Event) -> None:
        """A live event; dropped when the reader has to go to the log anyway."""
        if not self.behind:
            self._bytes += len(event.payload)
            if self._bytes > BUFFER_BYTES and self.events:
                self.events.clear()
                self._bytes = 0
                self.behind = True
            else:
                self.events.append(event)
        self._wake()

    def fall_behind(self) -> None:
        """There may be something in the log that never comes here."""
        self.behind = True
        self._wake()

    def end(self, reason: EndReason) -> None:
        """The response is to end, cleanly and now. The first reason stays."""
        if self.end_reason is None:
            self.end_reason = reason
            self._wake()
            if self.on_end is not None:
                self.on_end()

    def drain(self) -> None:
        """Send the client elsewhere, as soon as it can resume."""
        if self.resumable:
            self.end("drained")
        else:
            self._postponed = True

    def gave_id(self) -> None:
        """The client knows a position from now on."""
        if not self.resumable:
            self.resumable = True
            if self._postponed:
                self.end("drained")

    def take(self) -> list[Event]:
        """The live events so far."""
        events = list(self.events)
        self.events.clear()
        self._bytes = 0
        return events

    async def wait(self, timeout: float) -> bool:
        """Wait for anything above for at most `timeout` seconds; False when nothing came."""
        if self.changed:
            return True
        loop = asyncio.get_running_loop()
        self._changed = changed = loop.create_future()
        timer = loop.call_later(timeout, _resolve, changed)
        try:
            await changed
        finally:
            timer.cancel()
            self._changed = None
        return self.changed

    @property
    def changed(self) -> bool:
        """Whether there is something to do for the reader."""
        return bool(self.events or self.behind or self.end_reason)

    def _wake(self) -> None:
        if self._changed is not None:
            _resolve(self._changed)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Hub:
    """All subscriptions of a worker. At most one a stream: the newest."""

    def __init__(self) -> None:
        self._subscriptions: dict[int, Subscription] = {}
        self._of_session: dict[str, set[int]] = {}
        self._draining = False

    def __len__(self) -> int:
        return len(self._subscriptions)

    def subscribe(self, stream: int, session_id: str, generation: int, *, resumable: bool = True) -> Subscription:
        """Live events from here on. Attach, then subscribe, then read: so nothing falls between."""
        subscription = Subscription(stream, session_id, generation, resumable)
        other = self._subscriptions.get(stream)
        if other is not None and other.generation > generation:
            # Two attached at once and their answers overtook each other.
            subscription.end("superseded")
            return subscription
        if other is not None:
            other.end("superseded")
        self._subscriptions[stream] = subscription
        self._of_session.setdefault(session_id, set()).add(stream)
        if self._draining:
            subscription.drain()
        return subscription

    def reads(self, stream: int) -> bool:
        """Whether a stream has a reader here."""
        return stream in self._subscriptions

    def unsubscribe(self, subscription: Subscription) -> None:
        if self._subscriptions.get(subscription.stream) is subscription:
            del self._subscriptions[subscription.stream]
            streams = self._of_session[subscription.session_id]
            streams.discard(subscription.stream)
            if not streams:
                del self._of_session[subscription.session_id]

    def publish(self, stream: int, event: Event) -> None:
        if (subscription := self._subscriptions.get(stream)) is not None:
            subscription.offer(event)

    def wake(self, stream: int) -> None:
        if (subscription := self._subscriptions.get(stream)) is not None:
            subscription.fall_behind()

    def wake_all(self) -> None:
        """The listener was away: whatever it missed is in the log."""
        for subscription in self._subscriptions.values():
            subscription.fall_behind()

    def supersede(self, stream: int, generation: int) -> None:
        """A reader of this generation attached somewhere: an older one here ends."""
        subscription = self._subscriptions.get(stream)
        if subscription is not None and subscription.generation < generation:
            subscription.end("superseded")

    def end_stream(self, stream: int, reason: EndReason, *, retry: int | None = None) -> bool:
        """End the response that reads this stream; False when it is not read here. `retry` as in the subscription."""
        if (subscription := self._subscriptions.get(stream)) is None:
            return False
        subscription.retry = retry
        subscription.end(reason)
        return True

    def end_session(self, session_id: str) -> None:
        """A session ended: its readers get what is in the log (the finals), and then their end."""
        for stream in self._of_session.get(session_id, ()):
            self._subscriptions[stream].fall_behind()

    def send_away(self) -> None:
        """This worker takes a new number: who can come back is to attach under it. The others wait for their finals."""
        for subscription in list(self._subscriptions.values()):
            if subscription.resumable:
                subscription.end("ended")

    def drain(self) -> None:
        """End every response that can be resumed, also those to come."""
        self._draining = True
        for subscription in list(self._subscriptions.values()):
            subscription.drain()

    def sessions(self) -> set[str]:
        """The sessions that somebody reads here."""
        return set(self._of_session)
