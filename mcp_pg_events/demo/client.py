"""The client of the demo: the SDK's own, in a process of its own.

Run as `python -m mcp_pg_events.demo.client`, with `{"url": ..., "events": ..., "seconds": ...}` as its input. It knows
nothing of workers or cuts, and writes what it receives to its output, one JSON object a line, for `run` to count.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from typing import Any

from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client


async def call(url: str, events: int, seconds: float) -> None:
    """Make the one long call."""

    async def received(progress: float, total: float | None, message: str | None) -> None:
        _say(event=int(progress))

    async with streamable_http_client(url) as (incoming, outgoing), ClientSession(incoming, outgoing) as session:
        await session.initialize()
        arguments = {"events": events, "seconds": seconds}
        result = await session.call_tool("count", arguments, progress_callback=received)
        _say(result="".join(getattr(block, "text", "") for block in result.content), failed=bool(result.is_error))


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Make the call, or say in one line why it failed."""
    line = sys.stdin.readline()
    if not line:
        return
    threading.Thread(target=_end_with_the_demo, daemon=True).start()
    try:
        asyncio.run(call(**json.loads(line)))
    except Exception as error:
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        _say(result=f"{type(error).__name__}: {error}", failed=True)


def _end_with_the_demo() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
