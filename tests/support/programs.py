"""Programs on stdio behind the proxy: options for their manners, and calls that last as long as a test wants."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.support.mcp_http import Response, Session
from tests.support.workers import Workers

INITIALIZE = {
    "jsonrpc": "2.0",
    "id": 0,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    },
}
HEADERS = {"Accept": "application/json, text/event-stream"}


def program(manner: str = "", **stdio: Any) -> dict[str, Any]:
    """Options of `start_workers` for a program of such a manner."""
    return {"stdio": {"env": {"TEST_PROGRAM": manner}, "stop_timeout": 1.0, **stdio}}


async def pid_of(session: Session, **where: Any) -> int:
    return int(json.loads(await session.call_result("whoami", **where))["pid"])


async def waiting_call(workers: Workers, session: Session, key: str, **where: Any) -> Response:
    response = await session.call("wait", {"key": key}, progress_token=key, id=key, **where)
    await workers.wait_for(key)
    return response


async def reason_of(response: Response, timeout: float = 10.0) -> str:
    async with asyncio.timeout(timeout):
        return str((await response.result())["error"]["data"]["reason"])


async def cursor_of(response: Response) -> str:
    """The id of its next event with a message; the rest is not read."""
    async for event in response.events():
        if event.data:
            return event.id or ""
    raise AssertionError("The response ended.")
