"""Servers and apps in this process, for the tests of how they are put together. All have the tools of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmcp import Context as FastMCPContext
from fastmcp import FastMCP
from mcp.server.mcpserver import Context, MCPServer

from tests.servers.common import register
from tests.support.mcp_http import LATEST, Session, request

ACCEPT = {"Accept": "application/json, text/event-stream"}


def mcpserver(name: str = "one", **options: Any) -> MCPServer:
    server = MCPServer(name, **options)
    register(server.tool, Context)
    return server


def fastmcp(name: str = "one", **options: Any) -> FastMCP:
    server = FastMCP(name, **options)
    register(server.tool, FastMCPContext)
    return server


FRAMEWORKS: dict[str, Callable[..., Any]] = {"mcpserver": mcpserver, "fastmcp": fastmcp}


def http_app(server: Any, **options: Any) -> Any:
    """The app of either framework's server."""
    return server.http_app(**options) if isinstance(server, FastMCP) else server.streamable_http_app(**options)


def initialize_message(version: str = LATEST) -> dict[str, Any]:
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "client", "version": "1"}}
    return {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}


async def initialize_status(base_url: str, path: str = "/mcp") -> int:
    """The status that a new client's first request gets."""
    response = await request("POST", base_url + path, headers=ACCEPT, body=initialize_message())
    await response.read()
    return response.status


async def assert_durable(base_url: str, path: str = "/mcp", **headers: str) -> Session:
    """Open a session, call a tool, and resume the call from its priming event: only a log can answer that."""
    session = await Session.initialize(base_url, path=path, headers=headers)
    events = [event async for event in (await session.call("echo", {"text": path})).events()]
    assert events[-1].message["result"]["content"][0]["text"] == path
    assert [event.data for event in events[:1]] == [""], "There is no priming event."
    assert await (await session.get(events[0].id)).messages() == [events[-1].message]
    return session
