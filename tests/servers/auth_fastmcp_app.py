"""The test server behind FastMCP's bearer authentication: `uvicorn tests.servers.auth_fastmcp_app:app`."""

from fastmcp import Context, FastMCP
from fastmcp.server.auth.providers.jwt import StaticTokenVerifier

from tests.servers.common import durable_app, register
from tests.servers.tokens import TOKENS

server = FastMCP("test-auth-fastmcp", auth=StaticTokenVerifier(TOKENS, required_scopes=["use"]))
register(server.tool, Context)
app = durable_app(server.http_app)
