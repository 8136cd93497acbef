"""Three workers behind haproxy, replaced one after the other while fifty SDK clients work."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx2
import mcp_types as types
import pytest
from mcp import ClientSession, MCPError
from mcp.client.streamable_http import streamable_http_client

from tests.e2e.conftest import StartWorkers
from tests.faults.test_death import trusted
from tests.support.haproxy import round_robin
from tests.support.until import until
from tests.support.workers import Workers

pytestmark = [pytest.mark.slow, pytest.mark.anyio, pytest.mark.timeout(240)]

CLIENTS = int(os.environ.get("ROLLING_CLIENTS", "50"))
EVENTS = 8
SECONDS = 0.8
OPTIONS = {"app": {"retry_interval": 100}, "durable": {"drain_timeout": 10}}


class Client:
    """One SDK client that works in a loop: a call with progress, a question, and notifications of the session."""

    def __init__(self, session: ClientSession) -> None:
        self.session = session
        self.calls = 0
        self.lost = 0
        self.told: list[int] = []
        self.announced = 0
        self.since = 0.0
        """When the call that runs began; 0 while none does."""

    async def count(self) -> None:
        received: list[str] = []

        async def on_progress(progress: float, total: float | None, message: str | None) -> None:
            received.append(message or "")

        result = await self.call("count", {"n": EVENTS, "seconds": SECONDS}, on_progress)
        if result is not None:
            assert result == f"counted {EVENTS}"
            assert received == [str(index) for index in range(EVENTS)]

    async def ask(self) -> None:
        answer = await self.call("ask", {"question": "who?"}, None)
        if answer is not None:
            assert json.loads(answer)["content"] == {"answer": "who?"}

    async def announce(self) -> None:
        if await self.call("announce", {"n": 3}, None) is not None:
            self.announced += 3

    async def call(self, name: str, arguments: dict[str, Any], on_progress: Any) -> str | None:
        """The result's text; None where the call ended because its worker was lost."""
        self.since = time.monotonic()
        try:
            result = await self.session.call_tool(name, arguments, progress_callback=on_progress)
        except MCPError as error:
            if error.error.data != {"reason": "worker_lost"}:
                raise AssertionError(f"{name}: {error.error}") from error
            self.lost += 1
            return None
        finally:
            self.since = 0.0
        assert not result.is_error, result
        self.calls += 1
        content = result.content[0]
        assert isinstance(content, types.TextContent)
        return content.text

    async def work(self, over: asyncio.Event) -> None:
        while not over.is_set():
            await self.count()
            await self.ask()
            await self.announce()


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client]:
    async def answer(context: object, params: types.ElicitRequestParams) -> types.ElicitResult:
        return types.ElicitResult(action="accept", content={"answer": params.message})

    async def note(params: types.LoggingMessageNotificationParams) -> None:
        assert isinstance(params.data, dict)
        client.told.append(params.data["index"])

    async with (
        httpx2.AsyncClient(timeout=httpx2.Timeout(60.0), limits=httpx2.Limits(max_connections=None)) as http,
        streamable_http_client(f"{url}/mcp", http_client=http) as (read, write),
        ClientSession(read, write, elicitation_callback=answer, logging_callback=note) as session,
    ):
        client = Client(session)
        await session.initialize()
        yield client


async def while_clients_work(url: str, replace: Callable[[list[Client]], Awaitable[None]]) -> list[Client]:
    """Run `replace` while the clients work; they end when it has, each with what it does."""
    over = asyncio.Event()
    clients: list[Client] = []

    async def run() -> None:
        async with connected(url) as client:
            clients.append(client)
            if len(clients) == CLIENTS:
                ready.set()
            await client.work(over)
            # The notifications of the last round are on their way on the standalone stream.
            with contextlib.suppress(TimeoutError):
                await until(lambda: _value(len(client.told) >= client.announced), 10)

    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(run())
        await asyncio.wait_for(ready.wait(), 60)
        await replace(clients)
        over.set()
    return clients


async def _value(value: object) -> object:
    return value


async def replaced(workers: Workers, index: int, signum: int) -> None:
    """End a worker, and start another one on its port."""
    old = workers[index]
    old.signal(signum)
    await asyncio.wait_for(old.process.wait(), 30)
    new = await workers.add(port=old.port)
    workers.members[index] = new
    workers.members.pop()


async def test_a_rolling_restart_loses_no_call_and_no_event(migrated: str, start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 3, options=OPTIONS)
    async with round_robin(workers.urls) as proxy:

        async def replace(clients: list[Client]) -> None:
            for index in range(3):
                await replaced(workers, index, signal.SIGTERM)

        clients = await while_clients_work(proxy.url, replace)
    assert sum(client.lost for client in clients) == 0
    assert all(client.calls > 3 for client in clients)
    for client in clients:
        assert client.told == [0, 1, 2] * (client.announced // 3)
    workers.assert_clean_logs()


async def test_killed_workers_end_every_call_with_its_result_or_an_error_in_time(
    migrated: str, start_workers: StartWorkers
) -> None:
    workers = await start_workers("mcpserver_app", 3, options=OPTIONS)
    async with round_robin(workers.urls) as proxy:
        slowest = 0.0

        async def replace(clients: list[Client]) -> None:
            nonlocal slowest
            for index in range(3):
                await trusted(workers, migrated)
                workers[index].signal(signal.SIGKILL)
                killed = time.monotonic()
                running = {client: client.since for client in clients if client.since}
                await until(lambda: _value(all(c.since != since for c, since in running.items())), 20)  # noqa: B023 (awaited here)
                slowest = max(slowest, time.monotonic() - killed)
                await replaced(workers, index, signal.SIGKILL)

        clients = await while_clients_work(proxy.url, replace)
    assert slowest < 3.0 + SECONDS, "A call that ran when its worker was killed took too long to end."
    assert sum(client.lost for client in clients) > 0, "No call was lost, so nothing was tested."
    assert all(client.calls > 3 for client in clients)
