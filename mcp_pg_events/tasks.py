"""How the parts of a worker end their background tasks."""

from __future__ import annotations

import asyncio
from typing import Any, Final

__all__ = ["end", "ended"]

AGAIN: Final = 2.0
"""After how long (seconds) a task that goes on is cancelled once more: longer than an orderly cancellation takes."""


async def end(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks, and return when each has ended, however it did.

    Once is not always enough. Before Python 3.12 `asyncio.wait_for` drops a cancellation that comes in the same moment
    as what it waits for, and a connection pool waits so for its connections: a worker that was stopped just as its
    database came back went on for ever.
    """
    pending = {task for task in tasks if task is not None and not task.done()}
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=AGAIN)
    await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)


async def ended(task: asyncio.Task[Any]) -> None:
    """Return when a task has ended, also if the caller is cancelled meanwhile, once more or several times."""
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            pass
