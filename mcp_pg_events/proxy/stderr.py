"""What a program writes to its standard error, in the log: a line each, of bounded length and at a bounded rate.

Its standard output never comes here: that is protocol, and somebody's data.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import Final

__all__ = ["StderrLog"]

LINE_BYTES: Final = 2000
BURST: Final = 200
RATE: Final = 20.0
"""How many lines may come at once, and a second in the long run; the others are counted."""

_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")


class StderrLog:
    """Lines of one program, written to `logger` with the id of its session. `feed` what was read, and `close`."""

    def __init__(self, session_id: str, logger: logging.Logger, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._session_id = session_id
        self._logger = logger
        self._clock = clock
        self._line = bytearray()
        self._cut = False
        self._credit = float(BURST)
        self._counted_at = clock()
        self._dropped = 0

    def feed(self, data: bytes) -> None:
        """Log the lines that are whole with `data`; the rest is kept, as far as a line may be long."""
        *ends, rest = data.split(b"\n")
        for end in ends:
            self._add(end)
            self._end_line()
        self._add(rest)

    def close(self) -> None:
        """Nothing more comes."""
        if self._line:
            self._end_line()
        self._tell_dropped()

    def _add(self, part: bytes) -> None:
        room = LINE_BYTES - len(self._line)
        self._line += part[:room]
        self._cut = self._cut or len(part) > room

    def _end_line(self) -> None:
        line, cut = bytes(self._line), self._cut
        self._line.clear()
        self._cut = False
        text = line.decode(errors="replace").rstrip()
        if not text:
            return
        now = self._clock()
        self._credit = min(BURST, self._credit + (now - self._counted_at) * RATE)
        self._counted_at = now
        if self._credit < 1:
            self._dropped += 1
            return
        self._credit -= 1
        self._tell_dropped()
        # Escaped, so that no program writes lines of its own into the log, or moves a terminal's cursor.
        shown = _UNPRINTABLE.sub(lambda found: "\t" if found[0] == "\t" else ascii(found[0])[1:-1], text)
        self._logger.info("Session %s, stderr: %s%s", self._session_id, shown, " ..." if cut else "")

    def _tell_dropped(self) -> None:
        if self._dropped:
            self._logger.warning(
                "Session %s, stderr: %d lines were left out, since they came too fast", self._session_id, self._dropped
            )
            self._dropped = 0
