"""A session that was carried into another database: its client comes back to a worker there, with the id it has."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest
from mcp.client.streamable_http import streamable_http_client
from mcp_types import JSONRPCMessage, JSONRPCRequest, jsonrpc_message_adapter

from tests.e2e.conftest import StartWorkers
from tests.support.command import mcp_pg_events
from tests.support.log import assert_streams_are_whole, query
from tests.support.mcp_http import Session
from tests.support.postgres import create_database, database_name, drop_database
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio


@pytest.fixture
async def elsewhere(
    postgres_dsn: str, migrated_template: str, anyio_backend: str
) -> AsyncIterator[tuple[str, Workers]]:
    """A second database, and two workers on it."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    async with run_workers("mcpserver_app", dsn, 2) as workers:
        yield dsn, workers
    drop_database(postgres_dsn, dsn)


async def test_a_client_resumes_on_a_worker_of_the_other_database(
    start_workers: StartWorkers, migrated: str, elsewhere: tuple[str, Workers], tmp_path: Path
) -> None:
    dsn, there = elsewhere
    here = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(here[0].url, client="carried")
    assert session.session_id is not None
    response = await session.call("count", {"n": 5, "seconds": 0.1}, progress_token="p")
    events = [event async for event in response.events() if event.data]
    running = await session.call("wait", {"key": "k"}, progress_token="q", base_url=here[1].url)
    await here.wait_for("k")
    number = query(migrated, "SELECT number FROM streams WHERE final_seq IS NULL AND request_key IS NOT NULL")[0][0]

    file = tmp_path / "session.jsonl"
    ran = mcp_pg_events("export", session.session_id, "--output", str(file), MCP_PG_EVENTS_DSN=migrated)
    assert ran.code == 0, ran
    ran = mcp_pg_events("import", str(file), MCP_PG_EVENTS_DSN=dsn)
    assert (ran.code, ran.err) == (0, ""), ran

    assert (await session.get(events[1].id, base_url=here[0].url)).status == 200, "it is still here"
    resumed = await session.get(events[1].id, base_url=there[0].url)
    assert resumed.status == 200
    assert [(event.id, event.data) async for event in resumed.events() if event.data] == [
        (event.id, event.data) for event in events[2:]
    ]
    assert resumed.complete
    assert (await session.get(events[-1].id, base_url=there[1].url)).status == 204
    # The call that ran has no worker there, and one error.
    lost = await session.get(f"{number}-0", base_url=there[1].url)
    error = (await lost.messages())[-1]
    assert error["error"]["data"] == {"reason": "worker_lost"}
    # The session is whole: its client's name was carried, its calls run, and its numbers rise.
    assert (await session.whoami(base_url=there[1].url))["client"] == "carried"
    answer = await session.call("count", {"n": 1, "seconds": 0}, progress_token="r", base_url=there[0].url)
    ids = [event.id async for event in answer.events() if event.data]
    assert all(int((each or "").split("-")[0]) > number for each in ids)
    assert_streams_are_whole(dsn)
    running.close()
    there.assert_clean_logs()


async def test_the_sdks_own_transport_resumes_there(
    start_workers: StartWorkers, migrated: str, elsewhere: tuple[str, Workers], tmp_path: Path
) -> None:
    """The GET that the SDK's client sends when a response was cut."""
    dsn, there = elsewhere
    here = await start_workers("mcpserver_app", 1)
    session = await Session.initialize(here[0].url)
    assert session.session_id is not None
    response = await session.call("count", {"n": 4, "seconds": 0}, progress_token="p", id=77)
    events = [event async for event in response.events() if event.data]
    ran = mcp_pg_events("export", session.session_id, "--output", str(tmp_path / "f"), MCP_PG_EVENTS_DSN=migrated)
    assert mcp_pg_events("import", str(tmp_path / "f"), MCP_PG_EVENTS_DSN=dsn).code == 0, ran

    from mcp.shared.message import ClientMessageMetadata, SessionMessage

    async with (
        httpx2.AsyncClient(headers=session.headers(), timeout=20) as http,
        streamable_http_client(random.choice(there.urls) + "/mcp", http_client=http) as (read, write),
    ):
        request = JSONRPCRequest(jsonrpc="2.0", id=77, method="tools/call", params={"name": "count", "arguments": {}})
        await write.send(SessionMessage(request, ClientMessageMetadata(resumption_token=events[1].id)))
        received: list[JSONRPCMessage] = []
        async for message in read:
            assert not isinstance(message, Exception)
            received.append(message.message)
            if len(received) == 3:
                break
    expected = [jsonrpc_message_adapter.validate_json(event.data or "", by_name=False) for event in events[2:]]
    assert received == expected
