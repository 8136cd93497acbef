"""The HTTP proxy: two replicas before an upstream that knows nothing of them."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from tests.support.mcp_http import Session, close_all
from tests.support.postgres import create_database, database_name, drop_database
from tests.support.resuming import ResumingCall
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio

CALLS = 30
EVENTS = 150

Proxied = Callable[[str], Awaitable[tuple[Workers, Workers]]]


@pytest.fixture(scope="module")
async def proxied_once(
    migrated_once: str, postgres_dsn: str, migrated_template: str, anyio_backend: str
) -> AsyncIterator[Proxied]:
    """`await proxied("plain")`: two replicas, and the upstream behind them: `plain` gives its events no ids,
    `resumable` does, and resumes from them."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    started: dict[str, tuple[Workers, Workers]] = {}
    async with AsyncExitStack() as stack:

        async def get(kind: str) -> tuple[Workers, Workers]:
            if kind not in started:
                upstream = await stack.enter_async_context(
                    run_workers("mcpserver_app", dsn if kind == "resumable" else None, 1)
                )
                replicas = await stack.enter_async_context(
                    run_workers(
                        "proxied_app", migrated_once, 2, environment={"TEST_UPSTREAM": f"{upstream[0].url}/mcp"}
                    )
                )
                started[kind] = replicas, upstream
            return started[kind]

        yield get
    drop_database(postgres_dsn, dsn)


@pytest.fixture
async def proxied(proxied_once: Proxied) -> AsyncIterator[Proxied]:
    used: list[Workers] = []

    async def get(kind: str) -> tuple[Workers, Workers]:
        found = await proxied_once(kind)
        for workers in found:
            workers.forget()
            used.append(workers)
        return found

    yield get
    close_all()
    for workers in used:
        workers.assert_clean_logs("Rejected request with unknown or expired session ID")


@pytest.mark.parametrize("kind", ["plain", "resumable"])
async def test_thirty_calls_cut_at_random_lose_and_double_nothing(kind: str, proxied: Proxied) -> None:
    replicas, _ = await proxied(kind)
    rng = random.Random(7)
    session = await Session.initialize(replicas[0].url)
    calls = [
        ResumingCall(
            session, replicas.urls, random.Random(rng.random()), EVENTS, arguments={"n": EVENTS, "seconds": 4.0}
        )
        for _ in range(CALLS)
    ]
    await asyncio.gather(*(call.run() for call in calls))
    for call in calls:
        call.assert_exactly_once()


@pytest.mark.parametrize("kind", ["plain", "resumable"])
async def test_what_belongs_to_no_request_reaches_the_replica_that_the_client_listens_at(
    kind: str, proxied: Proxied
) -> None:
    replicas, _ = await proxied(kind)
    session = await Session.initialize(replicas[0].url)
    first = await session.get(base_url=replicas[1].url)
    assert await session.call_result("announce", {"n": 3}, base_url=replicas[0].url) == "announced 3"
    last = None
    seen = []
    async for event in first.events():
        last = event.id or last
        seen += [event.message["params"]["data"]["index"]] if event.data else []
        if len(seen) == 2:
            break
    first.cut()
    assert await session.call_result("announce", {"n": 2}, base_url=replicas[1].url) == "announced 2"
    again = await session.get(last, base_url=replicas[0].url)
    async for event in again.events():
        seen += [event.message["params"]["data"]["index"]] if event.data else []
        if len(seen) == 5:
            break
    again.cut()
    assert seen == [0, 1, 2, 0, 1]


async def test_answers_cancellations_and_delete_go_to_the_upstream_from_any_replica(proxied: Proxied) -> None:
    replicas, upstream = await proxied("plain")
    session = await Session.initialize(replicas[0].url, capabilities={"elicitation": {}})
    response = await session.call("ask", {"question": "well?"}, base_url=replicas[0].url)
    async for event in response.events():
        if event.data and event.message.get("method") == "elicitation/create":
            accepted = {"action": "accept", "content": {"answer": "yes"}}
            assert await session.answer(event.message["id"], accepted, base_url=replicas[1].url) == 202
        elif event.data and "result" in event.message:
            assert json.loads(event.message["result"]["content"][0]["text"])["content"] == {"answer": "yes"}
    cancelled = await session.call("note_cancellation", {"key": "k"}, id="c", base_url=replicas[0].url)
    await upstream.wait_for("k")
    told = await session.notify("notifications/cancelled", {"requestId": "c"}, base_url=replicas[1].url)
    assert told == 202
    assert "error" in await cancelled.result()
    assert (upstream.directory / "k.cancelled").exists()
    deleted = await session.delete(base_url=replicas[1].url)
    assert deleted.status == 200
    for url in replicas.urls:
        assert (await session.call("echo", {"text": "x"}, base_url=url)).status == 404
