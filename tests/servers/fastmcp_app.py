"""The test server on FastMCP: `uvicorn tests.servers.fastmcp_app:app`."""

from fastmcp import Context, FastMCP

from tests.servers.common import durable_app, register

server = FastMCP("test-fastmcp")
register(server.tool, Context)
app = durable_app(server.http_app)
