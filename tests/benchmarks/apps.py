"""The servers under test: the same tools for every subject, named by BENCHMARK_SUBJECT (`figures.py` has the names).

Each peer is wired as its own documentation says. `bare-sse` is Starlette alone, as the floor for idle streams.
"""

# No `from __future__ import annotations`: the SDK reads the tools' annotations.

import asyncio
import gc
import logging
import os
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from mcp.server.mcpserver import Context, MCPServer
from mcp.server.streamable_http import EventCallback, EventMessage, EventStore
from mcp_types import JSONRPCMessage
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from tests.benchmarks.figures import BARE, MEMORY, OURS, PERSIST, PERSIST_SQLITE

BARE_SSE = "bare Starlette SSE"

logging.disable(logging.WARNING)
server = MCPServer("benchmark", log_level="ERROR")
started = asyncio.Event()


@server.tool()
async def echo(text: str) -> str:
    """Give the text back."""
    return text


@server.tool()
async def go() -> str:
    """Let the calls that wait begin, all at once."""
    started.set()
    return "gone"


@server.tool()
async def ready() -> str:
    """Make the next calls wait for `go`."""
    started.clear()
    return "ready"


@server.tool()
async def emit(n: int, pause: float, offset: float, ctx: Context) -> str:
    """After `go` and the offset, send n notifications that carry the moment of their emission, with pauses between."""
    await started.wait()
    await asyncio.sleep(offset)
    for index in range(n):
        await ctx.report_progress(index + 1, n, str(time.monotonic_ns()))
        await asyncio.sleep(pause)
    return "emitted"


@server.tool()
async def pour(n: int, size: int, ctx: Context) -> str:
    """After `go`, send n notifications of a size as fast as they are taken."""
    await started.wait()
    text = "x" * size
    for index in range(n):
        await ctx.report_progress(index + 1, n, text)
    return "poured"


class MemoryEventStore(EventStore):
    """Events in memory, after the SDK's example: the newest 100 of each stream."""

    def __init__(self) -> None:
        self._streams: dict[str, deque[tuple[str, JSONRPCMessage | None]]] = {}
        self._stream_of: dict[str, str] = {}

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        event_id = str(uuid4())
        events = self._streams.setdefault(stream_id, deque(maxlen=100))
        if len(events) == events.maxlen:
            self._stream_of.pop(events[0][0], None)
        events.append((event_id, message))
        self._stream_of[event_id] = stream_id
        return event_id

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        stream_id = self._stream_of.get(last_event_id)
        if stream_id is None:
            return None
        found = False
        for event_id, message in self._streams[stream_id]:
            if found and message is not None:
                await send_callback(EventMessage(message, event_id))
            found = found or event_id == last_event_id
        return stream_id


async def _idle(request: Request) -> StreamingResponse:
    async def nothing() -> AsyncIterator[bytes]:
        yield b": here\n\n"
        while True:
            await asyncio.sleep(15)
            yield b": keep-alive\n\n"

    return StreamingResponse(nothing(), media_type="text/event-stream")


def make(subject: str, dsn: str) -> Any:
    """The ASGI app of a subject."""
    if subject == OURS:
        from mcp_pg_events import durable

        return durable(server.streamable_http_app(), dsn)
    if subject in (PERSIST, PERSIST_SQLITE):
        from mcp_persist import with_persistence

        backend = "postgres" if subject == PERSIST else "sqlite"
        url = dsn if subject == PERSIST else f"{os.environ['BENCHMARK_DIRECTORY']}/events.db"
        return with_persistence(server, backend=backend, url=url, ttl=3600, durable_sessions=True)
    if subject == BARE_SSE:
        return Starlette(routes=[Route("/mcp", _idle)])
    return server.streamable_http_app(event_store=MemoryEventStore() if subject == MEMORY else None)


if (chosen := os.environ.get("BENCHMARK_SUBJECT")) is not None:
    assert chosen in (OURS, PERSIST, PERSIST_SQLITE, BARE, MEMORY, BARE_SSE), chosen
    app = make(chosen, os.environ.get("BENCHMARK_DSN", ""))
    # For every subject, as `mcp-pg-events serve` does.
    gc.collect()
    gc.freeze()
