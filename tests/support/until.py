"""Waiting for something that another process does, and that cannot say so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

__all__ = ["until"]


async def until(condition: Callable[[], Awaitable[object]], timeout: float = 10.0) -> None:
    """Return when `condition` gives something true; raise TimeoutError after `timeout` seconds."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 (there is no event to wait for in this process)
            await asyncio.sleep(0.02)
