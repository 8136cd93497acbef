"""Real servers on stdio, behind two replicas of the proxy; every request of the SDK's client goes to a random one."""

from __future__ import annotations

import asyncio
import json
import random
import sys
from pathlib import Path

import pytest
from mcp.client.context import ClientRequestContext
from mcp_types import (
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequestParams,
    ElicitResult,
    ListRootsResult,
    LoggingMessageNotificationParams,
    Root,
    TextContent,
)

from tests.e2e.conftest import StartWorkers
from tests.support.node import install_everything
from tests.support.sdk_client import sdk_session

pytestmark = pytest.mark.anyio

PYTHON_SERVER = [sys.executable, str(Path(__file__).parents[1] / "servers" / "stdio_sdk_program.py")]


async def sample(context: ClientRequestContext, params: CreateMessageRequestParams) -> CreateMessageResult:
    return CreateMessageResult(role="assistant", content=TextContent(type="text", text="sampled"), model="m")


async def elicit(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
    return ElicitResult(action="accept", content={"answer": "yes", "name": "Somebody"})


async def roots(context: ClientRequestContext) -> ListRootsResult:
    return ListRootsResult(roots=[Root(uri="file:///somewhere", name="somewhere")])


async def test_the_everything_server_asks_reports_and_logs_through_any_replica(start_workers: StartWorkers) -> None:
    command = [*install_everything(), "stdio"]
    workers = await start_workers("stdio_app", 2, options={"stdio": {"command": command, "retry": 50}})
    logged: list[LoggingMessageNotificationParams] = []
    arrived = asyncio.Event()

    async def log(params: LoggingMessageNotificationParams) -> None:
        logged.append(params)
        arrived.set()

    seen: list[float] = []

    async def progress(number: float, total: float | None, message: str | None) -> None:
        seen.append(number)

    async with sdk_session(
        workers.urls,
        random.Random(7),
        cuts=2,
        sampling_callback=sample,
        elicitation_callback=elicit,
        list_roots_callback=roots,
        logging_callback=log,
    ) as (client, transport):
        names = {tool.name for tool in (await client.list_tools()).tools}
        assert {"echo", "trigger-sampling-request", "trigger-elicitation-request", "get-roots-list"} <= names
        arguments = {"duration": 2, "steps": 20}
        done = await client.call_tool("trigger-long-running-operation", arguments, progress_callback=progress)
        assert "completed" in done.content[0].text
        assert seen == list(range(1, 21))
        sampled = await client.call_tool("trigger-sampling-request", {"prompt": "?", "maxTokens": 5})
        assert "sampled" in sampled.content[0].text
        elicited = await client.call_tool("trigger-elicitation-request", {})
        assert "Somebody" in json.dumps([part.model_dump() for part in elicited.content])
        listed = await client.call_tool("get-roots-list", {})
        assert "file:///somewhere" in listed.content[0].text
        # It goes on when the call that began it is over.
        await client.call_tool("toggle-simulated-logging", {})
        async with asyncio.timeout(20):
            await arrived.wait()
        assert (await client.read_resource("demo://resource/static/document/features.md")).contents
    assert len({sent.worker for sent in transport.sent}) == 2
    assert sum(sent.cut is not None for sent in transport.sent) >= 2


async def test_a_python_server_on_stdio_is_served_whole_through_any_replica(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 2, options={"stdio": {"command": PYTHON_SERVER, "retry": 50}})
    indices: dict[int, list[str]] = {number: [] for number in range(5)}

    async with sdk_session(workers.urls, random.Random(8), cuts=3, elicitation_callback=elicit) as (client, transport):

        async def call(number: int) -> None:
            async def progress(done: float, total: float | None, message: str | None) -> None:
                indices[number].append(str(message))

            counted = await client.call_tool("count", {"n": 60, "seconds": 2.0}, progress_callback=progress)
            assert counted.content[0].text == "counted 60"

        await asyncio.gather(*(call(number) for number in indices))
        assert indices == {number: [str(index) for index in range(60)] for number in indices}
        asked = await client.call_tool("ask", {"question": "well?"})
        assert json.loads(asked.content[0].text)["content"] == {"answer": "yes", "name": "Somebody"}
        failed = await client.call_tool("fail", {})
        assert failed.is_error
    assert len({sent.worker for sent in transport.sent}) == 2
