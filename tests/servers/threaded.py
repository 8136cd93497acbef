"""The test server in a thread of a program that handles signals itself: `python -m tests.servers.threaded PORT`.

No handler of ours can be installed in a thread, so this is the program of those who call `await store.drain()`.
"""

import asyncio
import os
import signal
import sys
import threading

import uvicorn
from mcp.server.mcpserver import Context, MCPServer

from mcp_pg_events import PostgresStore, durable
from tests.servers.common import OPTIONS, register


def main(port: int) -> None:
    # A thread inherits the mask, so that the signal waits for `sigwait` here.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    server = MCPServer("test-mcpserver")  # so that its sessions are known to the workers of `mcpserver_app`
    register(server.tool, Context)
    store = PostgresStore(os.environ["MCP_PG_EVENTS_DSN"], **OPTIONS["durable"])
    app = durable(server.streamable_http_app(), store)
    running = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(running.serve(),))
    thread.start()
    signal.sigwait({signal.SIGTERM})
    asyncio.run_coroutine_threadsafe(store.drain(), loop).result()
    running.should_exit = True
    thread.join()
    loop.close()


if __name__ == "__main__":
    main(int(sys.argv[1]))
