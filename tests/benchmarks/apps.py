"""The servers under test: the same tools for every subject, named by BENCHMARK_SUBJECT (`figures.py` has the names).

Each peer is wired as its own documentation says. `bare-sse` is Starlette alone, as the floor for idle streams.
"""

# No `from __future__ import annotations`: the SDK reads the tools' annotations.

import asyncio
import contextlib
import gc
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from mcp.server.mcpserver import Context, MCPServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from tests.benchmarks.figures import (
    BARE,
    MEMORY,
    OURS,
    PERSIST,
    PERSIST_PROXY,
    PERSIST_SQLITE,
    PROXY,
)
from tests.support.memory_events import MemoryEventStore

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


async def _idle(request: Request) -> StreamingResponse:
    async def nothing() -> AsyncIterator[bytes]:
        yield b": here\n\n"
        while True:
            await asyncio.sleep(15)
            yield b": keep-alive\n\n"

    return StreamingResponse(nothing(), media_type="text/event-stream")


def _persists_proxy(upstream: str, dsn: str) -> Any:
    """mcp-persist's proxy, made in the app's lifespan, as its own command does."""
    from mcp_persist import PersistenceProxy

    running: dict[str, PersistenceProxy] = {}

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with PersistenceProxy.create(upstream, backend="postgres", url=dsn, ttl=3600) as proxy:
            running["proxy"] = proxy
            yield

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await running["proxy"](scope, receive, send)

    outer = Starlette(lifespan=lifespan)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (outer if scope["type"] == "lifespan" else serve)(scope, receive, send)

    return app


def make(subject: str, dsn: str) -> Any:
    """The ASGI app of a subject."""
    if subject == PROXY:
        from mcp_pg_events.proxy.http import proxy_app

        return proxy_app(f"{os.environ['BENCHMARK_UPSTREAM']}/mcp", dsn)
    if subject == PERSIST_PROXY:
        return _persists_proxy(os.environ["BENCHMARK_UPSTREAM"], dsn)
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
    assert chosen in (OURS, PERSIST, PERSIST_SQLITE, BARE, MEMORY, BARE_SSE, PROXY, PERSIST_PROXY), chosen
    app = make(chosen, os.environ.get("BENCHMARK_DSN", ""))
    # For every subject, as `mcp-pg-events serve` does.
    gc.collect()
    gc.freeze()
