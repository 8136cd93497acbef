"""The tools of the tests on an SDK server that speaks stdio."""

from __future__ import annotations

from mcp.server.mcpserver import Context, MCPServer

from tests.servers.common import register

mcp = MCPServer("stdio-server")
register(mcp.tool, Context)

if __name__ == "__main__":
    mcp.run("stdio")
