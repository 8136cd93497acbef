"""The tools of the test servers, and the environment that configures them.

Both frameworks get the very same functions: their contexts agree on `session`, `request_context` and `report_progress`.
`start_workers` (`tests/support/workers.py`) sets the environment.

    MCP_PG_EVENTS_DSN   where a durable app keeps its sessions
    TEST_OPTIONS        JSON: {"app": {...}, "durable": {...}, "store": {...}, "owner_header": "x-owner",
                        "memory_events": true} (the SDK's own way, with events in memory)
    TEST_DURABLE        0 leaves the app as its framework made it
    TEST_DIRECTORY      where `wait` looks for its files
"""

# No `from __future__ import annotations`: `register` fills in each framework's own context type.

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import mcp_types as types

from tests.support.memory_events import MemoryEventStore

OPTIONS: dict[str, Any] = json.loads(os.environ.get("TEST_OPTIONS", "{}"))
LARGE = 4 * 1024 * 1024
background: set[asyncio.Task[None]] = set()

PAYLOADS = {
    "nul": "before\u0000after",
    "quotes": """'single' "double" `back` $1 $$ \\ %s {} \r\n\t""",
    "emoji": "👩‍👩‍👧‍👦 \U0001f9ea é e\u0301 \u2028\u2029",
    "sse": "id: 99-99\ndata: not an event\n\n: nor a comment\revent: x",
    "surrogate": "\ud800",
    "large": "x" * LARGE,
}


def durable_app(make: Callable[..., Any]) -> Any:
    """The app that `make` builds with the options of the environment, made durable unless TEST_DURABLE is 0."""
    options = dict(OPTIONS.get("app", {}))
    if OPTIONS.get("memory_events"):
        options["event_store"] = MemoryEventStore()
    app = make(**options)
    if os.environ.get("TEST_DURABLE") == "0":
        return app
    from mcp_pg_events import PostgresStore, durable

    dsn = os.environ["MCP_PG_EVENTS_DSN"]
    options = dict(OPTIONS.get("durable", {}))
    if header := OPTIONS.get("owner_header"):
        options["owner"] = lambda scope: dict(scope["headers"]).get(header.encode(), b"").decode()
    return durable(app, PostgresStore(dsn, **OPTIONS["store"]) if "store" in OPTIONS else dsn, **options)


async def wait_for_file(key: str) -> None:
    """Say that the wait has begun by making `<key>.waiting`, then wait until `<key>` exists."""
    directory = Path(os.environ["TEST_DIRECTORY"])
    (directory / f"{key}.waiting").touch()
    while not (directory / key).exists():  # noqa: ASYNC110 (another process makes the file)
        await asyncio.sleep(0.01)


async def count_up(
    progress: Callable[[float, float | None, str | None], Awaitable[None]], n: int, seconds: float
) -> str:
    """Send `n` progress notifications evenly over `seconds`; the message of each is its index."""
    loop = asyncio.get_running_loop()
    start = loop.time()
    for index in range(n):
        await progress(index + 1, n, str(index))
        await asyncio.sleep(max(0.0, start + (index + 1) * seconds / n - loop.time()))
    return f"counted {n}"


async def flood_until(
    key: str, size: int, rate: int, progress: Callable[[float, float | None, str | None], Awaitable[None]]
) -> str:
    """Send from 200 tasks in turn, each of which waits for its own, until the file `key` exists; how many were sent."""
    senders, sent, over = 200, 0, asyncio.Event()

    async def send(number: int) -> None:
        nonlocal sent
        while not over.is_set():
            await progress(0, None, f"{number}".ljust(size))
            sent += 1
            await asyncio.sleep(senders * size / rate)

    async with asyncio.TaskGroup() as group:
        for number in range(senders):
            group.create_task(send(number))
        await wait_for_file(key)
        over.set()
    return str(sent)


def log_entry(index: int, logger: str) -> types.LoggingMessageNotification:
    """A log notification that carries its index and the process that sent it."""
    data = {"index": index, "pid": os.getpid()}
    return types.LoggingMessageNotification(
        params=types.LoggingMessageNotificationParams(level="info", logger=logger, data=data)
    )


def register(tool: Callable[..., Callable[[Any], Any]], context: type[Any]) -> None:
    """Give the server whose decorator is `tool` all tools of the tests."""

    @tool()
    async def echo(text: str) -> str:
        """Give the text back."""
        return text

    @tool()
    async def count(n: int, seconds: float, ctx: context) -> str:  # type: ignore[valid-type]
        """Send n progress notifications evenly over some seconds."""
        return await count_up(ctx.report_progress, n, seconds)

    @tool()
    async def burst(n: int, size: int, ctx: context) -> str:  # type: ignore[valid-type]
        """Send n progress notifications of a size as fast as possible."""
        for index in range(n):
            await ctx.report_progress(index + 1, n, f"{index}".ljust(size))
        return f"burst of {n}"

    @tool()
    async def flood(key: str, size: int, rate: int, ctx: context) -> str:  # type: ignore[valid-type]
        """Try to send `rate` bytes a second, in notifications of `size` bytes from 200 tasks, until a file is there."""
        return await flood_until(key, size, rate, ctx.report_progress)

    @tool()
    async def payload(kind: str) -> str:
        """Return a result that is hard to store or to send."""
        return PAYLOADS[kind]

    @tool()
    async def log(n: int, ctx: context) -> str:  # type: ignore[valid-type]
        """Send n log entries on the stream of this request."""
        for index in range(n):
            await ctx.session.send_notification(log_entry(index, "request"), related_request_id=ctx.request_id)
        return f"logged {n}"

    @tool()
    async def announce(n: int, ctx: context, seconds: float = 0.0) -> str:  # type: ignore[valid-type]
        """Send n log entries that belong to no request, evenly over some seconds."""
        for index in range(n):
            await ctx.session.send_notification(log_entry(index, "announce"))
            await asyncio.sleep(seconds / n)
        return f"announced {n}"

    @tool()
    async def change_list(ctx: context) -> str:  # type: ignore[valid-type]
        """Send `notifications/resources/list_changed`, which belongs to no request."""
        await ctx.session.send_resource_list_changed()
        return "changed"

    @tool()
    async def whoami(ctx: context) -> str:  # type: ignore[valid-type]
        """What the server knows about this process, session and client, as JSON."""
        params = ctx.session.client_params
        capabilities = ctx.session.client_capabilities
        return json.dumps(
            {
                "pid": os.getpid(),
                "session_id": ctx.request_context.request.headers.get("mcp-session-id"),
                "protocol_version": ctx.session.protocol_version,
                "capabilities": capabilities and capabilities.model_dump(by_alias=True, exclude_none=True),
                "client": params and params.client_info.name,
            }
        )

    @tool()
    async def wait(key: str, ctx: context) -> str:  # type: ignore[valid-type]
        """Send one progress notification, and wait for a file that the test makes."""
        await ctx.report_progress(1, 2, "waiting")
        await wait_for_file(key)
        await ctx.report_progress(2, 2, "released")
        return f"waited for {key}"

    @tool()
    async def ask(question: str, ctx: context) -> str:  # type: ignore[valid-type]
        """Ask the client a question on the stream of this request; return its answer as JSON."""
        schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
        answer = await ctx.session.elicit_form(question, schema, related_request_id=ctx.request_id)
        return json.dumps({"action": answer.action, "content": answer.content, "pid": os.getpid()})

    @tool()
    async def close_stream(n: int, ctx: context) -> str:  # type: ignore[valid-type]
        """Send n progress notifications, end the response, and send n more."""
        for index in range(2 * n):
            if index == n:
                await ctx.close_sse_stream()
            await ctx.report_progress(index + 1, 2 * n, str(index))
        return f"closed after {n}"

    @tool()
    async def ask_later(key: str, ctx: context) -> str:  # type: ignore[valid-type]
        """Send progress, wait for a file, then ask as `ask` does."""
        await ctx.report_progress(1, 2, "waiting")
        await wait_for_file(key)
        schema = {"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}
        answer = await ctx.session.elicit_form("later?", schema, related_request_id=ctx.request_id)
        return json.dumps({"action": answer.action, "content": answer.content, "pid": os.getpid()})

    @tool()
    async def keep_telling(n: int, seconds: float, ctx: context) -> str:  # type: ignore[valid-type]
        """Send n log entries that belong to no request, each after some seconds, and do not wait for that."""
        session = ctx.session

        async def tell() -> None:
            for index in range(n):
                await asyncio.sleep(seconds)
                await session.send_notification(log_entry(index, "kept"))

        background.add(task := asyncio.create_task(tell()))
        task.add_done_callback(background.discard)
        return "telling"

    @tool()
    async def block(seconds: float) -> str:
        """Block the event loop."""
        time.sleep(seconds)  # noqa: ASYNC251 (that is what the tests want of it)
        return "blocked"

    @tool()
    async def close_standalone(ctx: context) -> str:  # type: ignore[valid-type]
        """End the response of the standalone stream."""
        await ctx.close_standalone_sse_stream()
        return "closed"

    @tool()
    async def note_cancellation(key: str) -> str:
        """Wait for ever, and make `<key>.cancelled` when that is cancelled."""
        try:
            await wait_for_file(key)
        except asyncio.CancelledError:
            (Path(os.environ["TEST_DIRECTORY"]) / f"{key}.cancelled").touch()
            raise
        return "not cancelled"

    @tool()
    async def fail() -> str:
        """Raise."""
        raise ValueError("This tool fails on purpose.")
