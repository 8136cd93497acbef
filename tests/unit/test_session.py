"""A session whose log fails: what its handlers notice of that, and what becomes of it (invariant 14)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, cast

import mcp_types as types
import pytest
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp_types import JSONRPCRequest
from starlette.requests import Request

from mcp_pg_events.backend import EventLog, Stream
from mcp_pg_events.errors import AppendRefused, DatabaseUnavailable, Error, WorkerFenced
from mcp_pg_events.hub import Hub
from mcp_pg_events.session import Session
from tests.support.log import until

pytestmark = pytest.mark.anyio


class FailingLog:
    """Stores in memory, or raises."""

    def __init__(self) -> None:
        self.stored: list[Any] = []
        self.error: Error | None = None
        self.failures = 0
        self.failing_streams: set[int] = set()

    async def append(self, stream: Stream, payload: bytes, *, final: bool = False) -> int:
        await asyncio.sleep(0)
        if self.error is not None and (not self.failing_streams or stream.number in self.failing_streams):
            self.failures += 1
            raise self.error
        self.stored.append(json.loads(payload))
        return len(self.stored)


class Handlers:
    """A tool that sends three notifications, or asks its client, and what that met."""

    def __init__(self) -> None:
        self.met: list[BaseException] = []
        self.finished: list[str] = []
        self.started = asyncio.Event()
        self.go_on = asyncio.Event()

    async def call_tool(self, ctx: ServerRequestContext, params: types.CallToolRequestParams) -> types.CallToolResult:
        try:
            self.started.set()
            await self.go_on.wait()
            for index in range(3):
                await ctx.session.report_progress(index, 3, "on the way")
        except BaseException as error:
            self.met.append(error)
            raise
        self.finished.append(params.name)
        return types.CallToolResult(content=[types.TextContent(text=params.name)])


class Running:
    def __init__(self, session: Session, log: FailingLog, handlers: Handlers) -> None:
        self.session, self.log, self.handlers = session, log, handlers
        self.over = asyncio.Event()

    def call(self, stream: int, name: str = "tool", *, id: int | None = None) -> None:
        """A request, by default with its stream's number for an id."""
        params = {"name": name, "arguments": {}, "_meta": {"progressToken": "t"}}
        message = JSONRPCRequest(jsonrpc="2.0", id=id or stream, method="tools/call", params=params)
        self.session.start(message, Stream(stream, "session"), Request({"type": "http", "headers": []}))


@contextlib.asynccontextmanager
async def running() -> AsyncIterator[Running]:
    log, handlers = FailingLog(), Handlers()
    server = Server("failing", on_call_tool=handlers.call_tool)
    found: list[Running] = []
    session = Session(
        server,
        {},
        cast(EventLog, log),
        Hub(),
        session_id="session",
        owner=None,
        worker=lambda: 1,
        json_response=False,
        on_over=lambda _: found[0].over.set(),
    )
    found.append(Running(session, log, handlers))
    session.connection.protocol_version = "2025-11-25"
    session.connection.initialized.set()
    task = asyncio.create_task(session.run())
    try:
        yield found[0]
    finally:
        session.end()
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), 5)


@pytest.mark.parametrize("error", [DatabaseUnavailable(), WorkerFenced()], ids=lambda error: type(error).__name__)
async def test_a_log_that_fails_ends_the_session_here_and_not_by_an_exception_in_a_handler(
    error: Error, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as r:
        r.call(1)
        await r.handlers.started.wait()
        r.log.error = error
        r.handlers.go_on.set()
        # It can be restored, here or elsewhere; what ran of it is cancelled.
        await asyncio.wait_for(r.over.wait(), 5)
    assert {type(met) for met in r.handlers.met} <= {asyncio.CancelledError}, r.handlers.met
    assert f"ends on this worker: {error}" in caplog.text
    assert "Traceback" not in caplog.text


async def test_an_event_that_is_refused_disturbs_neither_its_handler_nor_the_session(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as r:
        r.log.error, r.log.failing_streams = AppendRefused(), {1}
        r.handlers.go_on.set()
        r.call(1, "refused")
        r.call(2, "stored")
        await until(lambda: len(r.handlers.finished) == 2 and len(r.log.stored) == 4)
        assert not r.over.is_set()
        assert [message.get("id") for message in r.log.stored] == [None, None, None, 2]
    assert r.handlers.met == []
    assert sorted(r.handlers.finished) == ["refused", "stored"]
    assert "Traceback" not in caplog.text


async def test_a_call_whose_final_cannot_be_stored_does_not_silence_the_session() -> None:
    async with running() as r:
        r.handlers.go_on.set()
        r.log.error, r.log.failing_streams = AppendRefused(), {1}
        r.call(1, "first")
        await until(lambda: r.log.failures == 4)
        # The same request id is free again, with a stream of its own.
        r.call(2, "second", id=1)
        await until(lambda: len(r.log.stored) == 4)
        assert r.log.stored[-1]["result"]["content"][0]["text"] == "second"
