"""The TypeScript SDK's client through two replicas of the HTTP proxy in turn, before an upstream that knows of neither.

Calls, and what resumes them, go through a TCP proxy that cuts their connections; the standalone stream through another.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.support.haproxy import round_robin
from tests.support.node import Node
from tests.support.postgres import create_database, database_name, drop_database
from tests.support.tcp_proxy import TcpProxy
from tests.support.typescript_client import TypeScriptClient, typescript_client
from tests.support.workers import Workers, run_workers

# The first test of a machine has npm download its packages.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

CALLS = 6
EVENTS = 60
CUTS = 5

either = pytest.mark.parametrize("scene", ["plain", "resumable"], indirect=True)
# Of these a run without `slow` tries one kind: a proxy that a kind of upstream breaks fails the calls of both kinds.
one_quickly = pytest.mark.parametrize(
    "scene", ["plain", pytest.param("resumable", marks=pytest.mark.slow)], indirect=True
)


@dataclass(frozen=True, slots=True)
class Scene:
    """A client that is connected to the replicas in turn, the upstream, and what can be cut before the replicas."""

    client: TypeScriptClient
    upstream: Workers
    calls: TcpProxy
    listening: TcpProxy

    def replicas(self, **values: object) -> list[str]:
        """Which replica gave each of the client's responses of this kind."""
        return [str(response["worker"]) for response in self.client.told("response", **values)]


@pytest.fixture
async def scene(
    request: pytest.FixtureRequest, node: Node, migrated: str, postgres_dsn: str, migrated_template: str
) -> AsyncIterator[Scene]:
    """`plain` gives its events no ids; `resumable` does, and resumes from them."""
    own = None
    if request.param == "resumable":
        own = create_database(postgres_dsn, template=database_name(migrated_template))
    async with run_workers("mcpserver_app", own, 1) as upstream:
        environment = {"TEST_UPSTREAM": f"{upstream[0].url}/mcp"}
        async with (
            run_workers("proxied_app", migrated, 2, environment=environment) as replicas,
            round_robin(replicas.urls) as proxy,
            TcpProxy.to("127.0.0.1", proxy.port) as calls,
            TcpProxy.to("127.0.0.1", proxy.port) as listening,
            typescript_client(
                node,
                proxy.url,
                calls=f"http://127.0.0.1:{calls.port}",
                listening=f"http://127.0.0.1:{listening.port}",
            ) as client,
        ):
            yield Scene(client, upstream, calls, listening)
            replicas.assert_clean_logs()
            upstream.assert_clean_logs()
    if own is not None:
        drop_database(postgres_dsn, own)


async def resumed_or_done(client: TypeScriptClient, key: str, since: int) -> None:
    """Return when a call has gone on after the client's event number `since`, or has its result.

    The client forgets where it was when it is cut before it has read the first event of a response.
    """
    cursors = {told["cursor"] for told in client.told("cursor", key=key)}
    seen = since
    resumed = False
    async with asyncio.timeout(20):
        while True:
            for told in client.events[seen:]:
                if told["event"] == "cursor" and told["key"] == key:
                    cursors.add(told["cursor"])
                    if resumed:
                        return
                resumed = resumed or (
                    told["event"] == "response"
                    and told["of"] == "GET"
                    and told["status"] == 200
                    and told["cursor"] in cursors
                )
            seen = len(client.events)
            if client.told("result", key=key):
                return
            await client.more()


@either
async def test_calls_at_once_that_are_cut_arrive_once_and_in_order(scene: Scene) -> None:
    client = scene.client
    rng = random.Random(5)
    calls = [await client.call("count", n=EVENTS, seconds=4) for _ in range(CALLS)]
    for message in sorted(rng.sample(range(3, EVENTS - 10), CUTS)):
        await client.event("progress", key=rng.choice(calls), message=str(message))
        since = len(client.events)
        scene.calls.cut()
        for call in calls:
            await resumed_or_done(client, call, since)
    for call in calls:
        result = await client.event("result", key=call)
        assert result["result"]["content"] == [{"type": "text", "text": f"counted {EVENTS}"}]
        messages = [told["message"] for told in client.told("progress", key=call)]
        assert messages == [str(index) for index in range(EVENTS)]
    assert set(scene.replicas(of="GET", call=True, status=200)) == {"0", "1"}
    assert len(client.told("response", of="GET", call=True, status=200)) > CALLS


@one_quickly
async def test_answers_and_cancellations_reach_the_upstream_through_the_other_replica(scene: Scene) -> None:
    client = scene.client
    asked = await client.call("ask", question="who?")
    result = await client.event("result", key=asked)
    assert json.loads(result["result"]["content"][0]["text"])["content"] == {"answer": "answer to who?"}
    # The call's result may be told of before the response to the answer that it waited for.
    await client.event("response", of="answer")
    assert scene.replicas(of="answer")[-1] != scene.replicas(of="tools/call")[-1]
    call = await client.call("note_cancellation", key="k")
    await scene.upstream.wait_for("k")
    await client.cancel(call)
    await client.event("response", of="notifications/cancelled", status=202)
    async with asyncio.timeout(10):
        while not (scene.upstream.directory / "k.cancelled").exists():  # noqa: ASYNC110 (made by another process)
            await asyncio.sleep(0.01)
    assert await client.event("error", key=call)


@one_quickly
async def test_the_standalone_stream_survives_a_cut(scene: Scene) -> None:
    client = scene.client
    call = await client.call("announce", n=10, seconds=0.5)
    await client.event("log", nth=3)
    scene.listening.cut()
    assert (await client.event("response", of="GET", nth=2, status=200, call=False))["cursor"] is not None
    await client.event("result", key=call)
    await client.event("result", key=await client.call("announce", n=5))
    await client.event("log", nth=15)
    assert [told["data"]["index"] for told in client.told("log")] == [*range(10), *range(5)]
