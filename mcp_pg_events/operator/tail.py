"""Follows one session: what it has stored, in the order of time, and then what comes.

It reads the log in read-only transactions, again and again. It is no reader of a stream: it takes no stream from
anybody, raises no generation, listens to nothing and makes nobody notify. Next: `cli/tail.py` shows the messages.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from ..appends import MARGIN
from .desk import Desk, checked_id, no_session
from .statements import tail as statements

__all__ = ["Ended", "Message", "Missing", "follow"]

STREAMS_AT_ONCE: Final = 50
PAGE_EVENTS: Final = 100
PAGE_BYTES: Final = 200_000
BUSY: Final = 0.25
QUIET: Final = 1.0
"""Seconds between two looks, while something comes and otherwise."""
QUIET_AFTER: Final = 20
_WHOLE: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Message:
    """One event: of a call (its `request_id` and `method`), or of the standalone stream.

    `payload` may be cut; `length` is how many bytes it has. `final`: it ends its stream.
    """

    stream: int
    seq: int
    created_at: datetime
    request_id: str | None
    method: str | None
    standalone: bool
    final: bool
    payload: str
    length: int


@dataclass(frozen=True, slots=True)
class Missing:
    """Numbers of a stream that are not there any more: retention or a purge let them go, or a failover skipped them."""

    stream: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The session ended, and everything of it was given. `reason` is None where its row is gone too."""

    reason: str | None


@dataclass(slots=True)
class _Place:
    """How far a stream has been given."""

    number: int
    request_id: str | None
    method: str | None
    standalone: bool
    opened: datetime
    bound: datetime
    final_seq: int | None
    after: int = 0
    whole: bool = True
    """Whether it is given from its beginning."""
    more: bool = False
    read: deque[dict[str, Any]] = field(default_factory=deque)


def follow(
    desk: Desk,
    session_id: str,
    *,
    since: datetime | timedelta | None = None,
    forever: bool = True,
    cut: int | None = None,
    wait: Callable[[float], None],
) -> Iterator[Message | Missing | Ended]:
    """The messages of a session from its beginning, or from `since`, until it ends; or those that there are now.

    `cut` is how many characters of a payload are needed. `wait` is called with seconds where there is nothing new.

    Raises:
        Error: there is no such session.
    """
    yield from _Tail(desk, session_id, since, cut).messages(forever, wait)


class _Tail:
    def __init__(self, desk: Desk, session_id: str, since: datetime | timedelta | None, cut: int | None) -> None:
        self._desk = desk
        self._session_id = checked_id(desk, session_id)
        self._since = since
        self._cut = cut if cut is not None else _WHOLE
        self._places: dict[int, _Place] = {}
        self._done: set[int] = set()
        self._looked: datetime | None = None

    def messages(self, forever: bool, wait: Callable[[float], None]) -> Iterator[Message | Missing | Ended]:
        quiet = 0
        while True:
            # Asked before the events are read: what it had stored when it ended can be seen by then.
            rows = self._desk.look(statements.TAIL_SESSION, {"session": self._session_id})
            if not rows:
                if self._looked is None:
                    raise no_session(self._desk, self._session_id)
                yield Ended(None)
                return
            [session] = rows
            if isinstance(self._since, timedelta):
                self._since = session["now"] - self._since
            self._look(session["now"])
            came = False
            for message in self._merged():
                came = True
                yield message
            yield from self._close()
            if session["ended_at"] is not None:
                yield Ended(session["ended_reason"])
                return
            if not forever:
                return
            quiet = 0 if came else quiet + 1
            wait(BUSY if quiet < QUIET_AFTER else QUIET)

    def _look(self, now: datetime) -> None:
        """Learn of new streams, and of those that have ended."""
        assert not isinstance(self._since, timedelta)
        rows = self._desk.look(
            statements.TAIL_STREAMS,
            {
                "session": self._session_id,
                "since": self._since,
                "looked": self._looked,
                "unread": list(self._places),
            },
        )
        self._looked = now
        for row in rows:
            number = row["number"]
            if number in self._done:
                continue
            place = self._places.get(number)
            if place is None:
                self._places[number] = _Place(
                    number,
                    row["request_id"],
                    row["method"],
                    row["standalone"],
                    row["created_at"],
                    self._since or row["created_at"] - MARGIN,
                    row["final_seq"],
                    whole=self._since is None,
                )
            else:
                place.final_seq = row["final_seq"]

    def _merged(self) -> Iterator[Message | Missing]:
        """What there is beyond each stream's place, in the order of time; streams are opened when it gets to theirs."""
        waiting = deque(sorted(self._places.values(), key=lambda place: (place.opened, place.number)))
        heap: list[tuple[datetime, int, int]] = []

        def push(place: _Place) -> None:
            if place.read:
                heapq.heappush(heap, (place.read[0]["created_at"], place.number, place.read[0]["seq"]))

        while waiting or heap:
            if waiting and (not heap or waiting[0].opened <= heap[0][0]):
                batch = [waiting.popleft() for _ in range(min(len(waiting), STREAMS_AT_ONCE))]
                self._read(batch)
                for place in batch:
                    push(place)
                continue
            _, number, seq = heapq.heappop(heap)
            place = self._places[number]
            row = place.read.popleft()
            if seq != place.after + 1 and place.whole:
                yield Missing(number, place.after + 1, seq - 1)
            place.after, place.whole = seq, True
            place.bound = max(place.bound, row["created_at"] - MARGIN)
            yield _message(place, row)
            if not place.read and place.more:
                self._read([place])
            push(place)

    def _read(self, places: Sequence[_Place]) -> None:
        """The next page of each."""
        rows = self._desk.look(
            statements.TAIL_EVENTS,
            {
                "streams": [place.number for place in places],
                "after": [place.after for place in places],
                "bound": min(place.bound for place in places),
                "limit": PAGE_EVENTS,
                "bytes": PAGE_BYTES,
                "characters": self._cut,
            },
        )
        for place in places:
            place.more = False
        for row in rows:
            place = self._places[row["stream"]]
            place.read.append(row)
            place.more = row["more"]

    def _close(self) -> Iterator[Missing]:
        """Be done with the streams that ended, and of which everything that there is was given."""
        for place in [place for place in self._places.values() if place.final_seq is not None]:
            assert place.final_seq is not None
            if place.after < place.final_seq and place.whole:
                yield Missing(place.number, place.after + 1, place.final_seq)
            del self._places[place.number]
            self._done.add(place.number)


def _message(place: _Place, row: dict[str, Any]) -> Message:
    return Message(
        place.number,
        row["seq"],
        row["created_at"],
        place.request_id,
        place.method,
        place.standalone,
        bool(row["final"]),
        row["payload"],
        row["length"],
    )
