"""The test server on the MCP SDK's `MCPServer`: `uvicorn tests.servers.mcpserver_app:app`."""

from mcp.server.mcpserver import Context, MCPServer

from tests.servers.common import durable_app, register

server = MCPServer("test-mcpserver")
register(server.tool, Context)
app = durable_app(server.streamable_http_app)
