"""Sessions and streams of an upstream: the log's part of the proxy.

A stream is read from the upstream by one replica, its worker. When that is gone the stream is adrift, if the upstream
gave ids in it, until another replica claims it for a client that came back. Next: `proxy/relays.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from mcp_types import RequestId

from .appends import MARGIN, Identity
from .arrays import Int8Array, TextArray
from .backend import SessionKey, SessionUnknown, Stream
from .database import Database
from .hub import Hub
from .log import Log
from .queries import Queries, asking
from .writer import Writer

__all__ = ["Claim", "RelayedSession", "RelayedSessions"]

OVERDUE_AT_ONCE: Final = 100


@dataclass(frozen=True, slots=True)
class RelayedSession:
    """What a replica has to know of a session. `upstream` is the upstream's id of it, None where that gave none."""

    upstream: str | None
    protocol_version: str
    standalone: int


@dataclass(frozen=True, slots=True)
class Claim:
    """A stream that this worker goes on with, and the request that it answers: None is the standalone stream's.

    `last_id` is what the upstream calls the last event that is stored, None where that has no id. `fresh` says that
    nothing was ever stored in it.
    """

    stream: Stream
    request_id: RequestId | None
    last_id: bytes | None
    fresh: bool


class RelayedSessions:
    """Who reads which stream from the upstream. Every method may raise `errors.DatabaseUnavailable`."""

    def __init__(
        self, database: Database, queries: Queries, identity: Identity, log: Log, hub: Hub, writer: Writer
    ) -> None:
        self._database = database
        self._queries = queries
        self._identity = identity
        self._log = log
        self._hub = hub
        self._writer = writer
        self._changing: set[int] = set()
        """Streams that are claimed or released just now. Another claim meanwhile would take them a second time."""
        self._doubtful: set[int] = set()
        """Streams that may be this worker's in the database although nobody here reads them: an answer was lost."""

    async def find(self, key: SessionKey) -> RelayedSession:
        """What is known of a session. Raises `SessionUnknown`."""
        rows = await self._database.fetch(self._queries.relayed_session, asking(key))
        if not rows:
            raise SessionUnknown
        upstream, protocol_version, standalone = rows[0]
        return RelayedSession(upstream or None, protocol_version, standalone)

    async def note_id(self, stream: Stream, upstream_id: bytes) -> None:
        """The upstream gave its first id in a stream: another replica can go on with it from there."""
        parameters = {
            "streams": Int8Array([stream.number]),
            "upstream_ids": TextArray([upstream_id]),
            "me": self._identity.number,
        }
        await self._database.fetch(self._queries.resumable, parameters)

    async def release(self, streams: Iterable[Stream]) -> None:
        """Leave streams to other replicas. Everything that was appended to them has to be stored."""
        released = list(streams)
        for stream in released:
            self._writer.released(stream)
        await self._release({stream.number for stream in released})

    async def release_doubtful(self) -> None:
        """Leave to other replicas what this worker may hold without reading it, because the database went away in the
        middle of a claim or a release."""
        doubtful = {number for number in self._doubtful - self._changing if not self._writer.calls.owns(number)}
        if doubtful:
            await self._release(doubtful)

    async def _release(self, numbers: set[int]) -> None:
        self._changing |= numbers
        self._doubtful |= numbers
        try:
            await self._database.fetch(
                self._queries.release, {"streams": Int8Array(numbers), "me": self._identity.number}
            )
            self._doubtful -= numbers
        finally:
            self._changing -= numbers

    async def claim(self, key: SessionKey, number: int) -> Claim | None:
        """Go on with a stream that nobody reads from the upstream; None where somebody does, or it has ended."""
        if number in self._changing:
            return None
        self._changing.add(number)
        self._doubtful.add(number)
        try:
            claim = await self._claim(key, number)
            self._doubtful.discard(number)
        finally:
            self._changing.discard(number)
        return claim

    async def _claim(self, key: SessionKey, number: int) -> Claim | None:
        me = self._identity.number
        # Its own, where the answer to the same statement was lost.
        lost = not self._writer.calls.owns(number)
        parameters = asking(key) | {"stream": number, "me": me, "lost": lost}
        rows = await self._database.fetch(self._queries.claim, parameters)
        if not rows:
            return None
        epoch, created_at, request_id, request_key, first_id, base = rows[0]
        rows = await self._database.fetch(
            self._queries.last_relayed, {"stream": number, "bound": created_at - MARGIN}, prepare=False
        )
        # What was stored may be gone with its partition, and its last id too: the first would bring all of it again.
        seq, last_id = rows[0] if rows else (0, None if base else first_id)
        stream = self._log.own(me, epoch, number, key.session_id, created_at, request_key)
        stream.stored = max(seq, base)
        stream.next_seq = stream.stored + 1
        stream.read_elsewhere = not self._hub.reads(number)
        # Its session may have ended since, with nothing here yet to be told.
        self._writer.look_for_ended()
        return Claim(
            stream,
            None if request_id is None else json.loads(request_id),
            None if last_id is None else last_id.encode(),
            fresh=stream.stored == 0,
        )

    async def adrift(self, streams: Iterable[int]) -> list[int]:
        """Those of `streams` that nobody reads from the upstream."""
        rows = await self._database.fetch(self._queries.adrift, {"streams": Int8Array(streams)})
        return [number for (number,) in rows]

    async def unread(self, streams: Iterable[int]) -> set[int]:
        """Those of `streams` that no client reads, on any replica."""
        rows = await self._database.fetch(self._queries.unread, {"streams": Int8Array(streams)})
        return {number for (number,) in rows}

    async def overdue(self, server: str, seconds: float) -> list[tuple[int, str]]:
        """Calls of a server that have been adrift for so long, some of them: their streams and sessions."""
        rows = await self._database.fetch(
            self._queries.overdue, {"server": server, "timeout": seconds, "limit": OVERDUE_AT_ONCE}
        )
        return [(number, session_id) for number, session_id in rows]
