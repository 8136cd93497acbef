"""Requests to an ASGI app in this process, for tests that have to look at it while it answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any


async def ask(app: Any, message: dict[str, Any], on_start: Callable[[dict[bytes, bytes]], Awaitable[None]]) -> int:
    """POST a message to an ASGI app; `on_start` runs when the response's headers leave it. The status."""
    body = json.dumps(message).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(event: dict[str, Any]) -> None:
        nonlocal status
        if event["type"] == "http.response.start":
            status = event["status"]
            await on_start(dict(event["headers"]))

    headers = [
        (b"host", b"127.0.0.1:80"),
        (b"content-type", b"application/json"),
        (b"accept", b"application/json, text/event-stream"),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/mcp",
        "raw_path": b"/mcp",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
    await app(scope, receive, send)
    return status


def initialize(version: str = "2025-11-25") -> dict[str, Any]:
    client = {"name": "client", "version": "1"}
    params = {"protocolVersion": version, "capabilities": {"sampling": {}}, "clientInfo": client}
    return {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
