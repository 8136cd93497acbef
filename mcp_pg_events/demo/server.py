"""One worker of the demo: an ordinary server of the SDK, made durable in one call.

Run as `python -m mcp_pg_events.demo.server FD`, with the listening socket as an inherited descriptor. The first line of
its input is `{"dsn": ..., "schema": ...}`; it ends when its input does, so that it never outlives the demo.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading

import uvicorn
from mcp.server.mcpserver import Context, MCPServer

from .. import PostgresStore, durable

mcp = MCPServer("demo")


@mcp.tool()
async def count(events: int, seconds: float, ctx: Context) -> str:
    """Report progress `events` times, spread over `seconds`."""
    for number in range(1, events + 1):
        await asyncio.sleep(seconds / events)
        await ctx.report_progress(number, events)
    return f"counted to {events}"


def main() -> None:
    """Serve on the inherited socket until the demo ends."""
    line = sys.stdin.readline()
    if not line:
        return
    database = json.loads(line)
    threading.Thread(target=_end_with_the_demo, daemon=True).start()
    store = PostgresStore(database["dsn"], schema=database["schema"])
    # The client waits for `retry_interval` (milliseconds) before it comes back.
    app = durable(mcp.streamable_http_app(retry_interval=100), store)
    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=int(sys.argv[1]))])


def _end_with_the_demo() -> None:
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
