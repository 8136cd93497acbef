"""Who reads a stream: one reader, the newest, on whichever worker.

The statements are in `statements/readers.py`. Next: `reader.py` sends what the attachment says.
"""

from __future__ import annotations

from .appends import MARGIN, Identity
from .backend import Attachment, CursorRejected, SessionKey, SessionUnknown
from .database import Database
from .queries import Queries, asking
from .writer import Writer

__all__ = ["Attachments"]


class Attachments:
    """Attaching and detaching of readers on this worker, and the end of those elsewhere."""

    def __init__(
        self, database: Database, queries: Queries, identity: Identity, writer: Writer, channel_prefix: str
    ) -> None:
        self._database = database
        self._queries = queries
        self._identity = identity
        self._writer = writer
        self._prefix = channel_prefix

    async def attach(self, key: SessionKey, stream: int | None, after: int | None, *, patience: float) -> Attachment:
        """Become the newest reader of a stream, after a position that its client was given.

        Raises:
            SessionUnknown: no such session for this asker.
            CursorRejected: `unknown` (also another session's), or `expired`.
        """
        rows = await self._database.fetch(
            self._queries.find_stream, asking(key) | {"stream": stream, "after": after or 0}, patience=patience
        )
        if not rows:
            raise SessionUnknown
        protocol_version, number, standalone, floor, cursor, _, bound = rows[0]
        if number is None:
            raise CursorRejected("unknown")
        position: int = max(cursor, floor) if after is None else after
        bound -= MARGIN
        me = self._identity.number
        rows = await self._database.fetch(
            self._queries.attach,
            {
                "stream": number,
                "after": position,
                "bound": bound,
                "me": me,
                "prefix": self._prefix,
                "given": after is not None,
            },
            patience=patience,
            prepare=False,
        )
        # Its wake-ups would go to a channel that nobody hears any more.
        self._writer.check_identity(me)
        if not rows:
            raise CursorRejected("unknown")
        generation, final_seq, floor, given_at, _, was_given = rows[0]
        if generation is None:
            raise CursorRejected("expired" if was_given else "unknown")
        self._writer.calls.attached(number, generation, here=True)
        if given_at is not None:
            bound = max(bound, given_at - MARGIN)
        complete = final_seq is not None and position >= final_seq
        return Attachment(number, generation, position, bound, standalone, protocol_version or "", complete)

    async def detach(self, stream: int, generation: int, position: int) -> None:
        """The reader of this generation is gone; `position` is the last number it was handed."""
        await self._database.fetch(
            self._queries.detach, {"stream": stream, "generation": generation, "position": position}
        )

    async def close(self, stream: int) -> None:
        """End the response that reads `stream` on another worker; nothing when nobody reads it."""
        await self._database.fetch(
            self._queries.close_reader, {"stream": stream, "me": self._identity.number, "prefix": self._prefix}
        )
