"""SIGTERM begins the drain at once.

uvicorn reaches the lifespan's shutdown only when its connections have closed, and it is the drain that closes them. So
the handler that is there (uvicorn's, gunicorn's) is called as before, after the drain was begun.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["drain_on_sigterm"]


@contextmanager
def drain_on_sigterm(store: PostgresStore) -> Iterator[None]:
    """Drain `store` on SIGTERM and SIGINT, where handlers can be installed: in the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    installed = {}
    letting_go: list[asyncio.Task[None]] = []

    def begin(previous: object) -> None:
        store.begin_drain()
        if not letting_go:
            letting_go.append(asyncio.create_task(_let_go_of_stalled(store, getattr(previous, "__self__", None))))

    for number in (signal.SIGTERM, signal.SIGINT):
        previous = signal.getsignal(number)
        if not callable(previous):
            # Default or ignored: whoever runs this loop has not asked for signals, and ends as it always did.
            continue

        def handler(signum: int, frame: FrameType | None, previous: object = previous) -> None:
            loop.call_soon_threadsafe(begin, previous)
            if callable(previous):
                previous(signum, frame)

        signal.signal(number, handler)
        installed[number] = (handler, previous)
    try:
        yield
    finally:
        for task in letting_go:
            task.cancel()
        for number, (handler, previous) in installed.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, previous)


async def _let_go_of_stalled(store: PostgresStore, server: object) -> None:
    """uvicorn waits for its connections to close, which one whose client takes nothing never does. After the drain,
    those that uvicorn itself has closed are aborted; where the handler before ours was no uvicorn's, there are none."""
    await store.drain()
    while True:
        await asyncio.sleep(1)
        for connection in list(getattr(getattr(server, "server_state", None), "connections", ())):
            transport = getattr(connection, "transport", None)
            if transport is not None and transport.is_closing():
                transport.abort()
