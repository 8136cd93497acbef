"""The database takes no events for now: since when, and how long they may still wait. Next: `writer.py`."""

from __future__ import annotations

import asyncio
import logging

__all__ = ["Stall"]

logger = logging.getLogger(__name__)


class Stall:
    """One at a time, and none while the database takes events. Two lines in the log tell of each."""

    def __init__(self, timeout: float) -> None:
        self.since: float | None = None
        """When (loop time) it began; None while the database takes events."""
        self._timeout = timeout

    def begin(self, why: str) -> None:
        if self.since is None:
            self.since = asyncio.get_running_loop().time()
            logger.warning("The database takes no events for now, they wait: %s", why)

    def time_left(self) -> float:
        """How long the database may still keep events waiting, in seconds."""
        now = asyncio.get_running_loop().time()
        return max(0.0, (self.since or now) + self._timeout - now)

    def end(self) -> None:
        if self.since is not None:
            waited = asyncio.get_running_loop().time() - self.since
            self.since = None
            logger.warning("The database takes events again after %.1f s", waited)
