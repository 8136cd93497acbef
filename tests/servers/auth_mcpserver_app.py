"""The test server behind the SDK's bearer authentication: `uvicorn tests.servers.auth_mcpserver_app:app`."""

from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context, MCPServer

from tests.servers.common import durable_app, register
from tests.servers.tokens import TOKENS


class Verifier:
    """A `TokenVerifier` that knows the tokens of the tests."""

    async def verify_token(self, token: str) -> AccessToken | None:
        """The token's claims, or None for one that is not known."""
        if (claims := TOKENS.get(token)) is None:
            return None
        return AccessToken(
            token=token, client_id=claims["client_id"], scopes=claims["scopes"], subject=claims["sub"], claims=claims
        )


server = MCPServer(
    "test-auth-mcpserver",
    token_verifier=Verifier(),
    auth=AuthSettings(
        issuer_url="https://issuer-1.test",  # type: ignore[arg-type]  # pydantic makes it a URL
        resource_server_url=None,
        required_scopes=["use"],
    ),
)
register(server.tool, Context)
app = durable_app(server.streamable_http_app)
