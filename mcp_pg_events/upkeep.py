"""What an app does for its sessions now and then, whoever runs their requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

from .errors import Error

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["keep_up"]

logger = logging.getLogger(__name__)


async def keep_up(
    store: PostgresStore,
    name: str,
    idle_timeout: float | None,
    ids: Callable[[], set[str]],
    session_ended: Callable[[str], None],
) -> None:
    """Stamp what is in use, end what is idle by the database's clock, let go of objects whose session has ended."""
    interval = min(30.0, idle_timeout / 8) if idle_timeout else 30.0
    while True:
        # Not those that come to be meanwhile: their row may not be there yet.
        known = ids()
        await anyio.sleep(interval)
        try:
            await store.touch_sessions()
            if idle_timeout is not None:
                await store.expire_idle(name, idle_timeout)
            # Told at once, as a rule; a worker that was deaf then finds out here.
            for session_id in await store.log.gone_sessions(known & ids()):
                session_ended(session_id)
        except Error as error:
            logger.debug("Sessions were not looked after: %s", error)
