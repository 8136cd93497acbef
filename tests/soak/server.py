"""What the workers of the soak serve: the tools of the test servers, and one whose notifications have names."""

from __future__ import annotations

import asyncio

import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer

from tests.servers.common import durable_app, register

server = MCPServer("soak")
register(server.tool, Context)


@server.tool()
async def tell(tag: str, n: int, seconds: float, ctx: Context) -> str:
    """Send n log entries that belong to no request, evenly over some seconds, each with the tag and its index."""
    for index in range(n):
        params = types.LoggingMessageNotificationParams(level="info", data={"tag": tag, "index": index})
        await ctx.session.send_notification(types.LoggingMessageNotification(params=params))
        await asyncio.sleep(seconds / n)
    return f"told {n}"


app = durable_app(server.streamable_http_app)
