"""The TypeScript SDK's client against two workers in turn: it resumes, answers and cancels by its own rules.

Every request of the client's goes to the next worker. Calls, and what resumes them, go through a TCP proxy that cuts
their connections; the standalone stream goes through another.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from tests.conformance.conftest import SharedWorkers
from tests.support.haproxy import round_robin
from tests.support.node import Node
from tests.support.tcp_proxy import TcpProxy
from tests.support.typescript_client import TypeScriptClient, typescript_client
from tests.support.workers import Workers

# The first test of a machine has npm download its packages.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@dataclass(frozen=True, slots=True)
class Scene:
    """A connected client, the workers, and what can be cut between them."""

    client: TypeScriptClient
    workers: Workers
    calls: TcpProxy
    listening: TcpProxy

    def worker_of(self, what: str) -> str:
        """Which worker answered the client's last request of this kind."""
        return str(self.client.told("response", of=what)[-1]["worker"])

    async def cut(self, call: str) -> str:
        """Cut a call's connection; returns the worker that the client has resumed it on."""
        already = len(self.client.told("response", of="GET", call=True))
        cursors = len(self.client.told("cursor", key=call))
        self.calls.cut()
        resumed = await self.client.event("response", of="GET", call=True, nth=already + 1)
        assert resumed["status"] == 200
        # The client forgets where it was when it is cut before it has read the first event of the response.
        await self.client.event("cursor", key=call, nth=cursors + 1)
        return str(resumed["worker"])


def url_of(proxy: TcpProxy) -> str:
    return f"http://127.0.0.1:{proxy.port}"


@pytest.fixture
async def scene(node: Node, shared_workers: SharedWorkers) -> AsyncIterator[Scene]:
    """Two workers, and a client that is connected to them in turn."""
    workers = await shared_workers("mcpserver_app")
    async with (
        round_robin(workers.urls) as proxy,
        TcpProxy.to("127.0.0.1", proxy.port) as calls,
        TcpProxy.to("127.0.0.1", proxy.port) as listening,
        typescript_client(node, proxy.url, calls=url_of(calls), listening=url_of(listening)) as client,
    ):
        assert client.told("connected", protocol="2025-11-25")
        yield Scene(client, workers, calls, listening)
    workers.assert_clean_logs()


async def test_a_call_that_is_cut_goes_on_on_the_other_worker(scene: Scene) -> None:
    client = scene.client
    call = await client.call("count", n=60, seconds=3)
    await client.event("progress", key=call, message="5")
    owner = scene.worker_of("tools/call")
    assert await scene.cut(call) != owner
    await client.event("progress", key=call, message="15")
    assert await scene.cut(call) == owner
    result = await client.event("result", key=call)
    assert [told["message"] for told in client.told("progress")] == [str(index) for index in range(60)]
    assert result["result"]["content"] == [{"type": "text", "text": "counted 60"}]


async def test_a_call_that_is_cut_again_before_anything_came_keeps_its_place(scene: Scene) -> None:
    client = scene.client
    call = await client.call("wait", key="k")
    await client.event("progress", key=call, message="waiting")
    for _ in range(3):
        await scene.cut(call)
    scene.workers.release("k")
    await client.event("result", key=call)
    assert [told["message"] for told in client.told("progress")] == ["waiting", "released"]


async def test_an_elicitation_is_answered_through_the_other_worker(scene: Scene) -> None:
    client = scene.client
    call = await client.call("ask", question="who?")
    result = await client.event("result", key=call)
    assert json.loads(result["result"]["content"][0]["text"])["content"] == {"answer": "answer to who?"}
    # The call's result may be told of before the response to the answer that it waited for.
    await client.event("response", of="answer")
    assert scene.worker_of("answer") != scene.worker_of("tools/call")


async def test_an_elicitation_reaches_a_client_that_was_cut_before_it_was_asked(scene: Scene) -> None:
    client = scene.client
    call = await client.call("ask_later", key="k")
    await client.event("progress", key=call, message="waiting")
    assert await scene.cut(call) != scene.worker_of("tools/call")
    scene.workers.release("k")
    result = await client.event("result", key=call)
    assert json.loads(result["result"]["content"][0]["text"])["action"] == "accept"
    assert len(client.told("elicitation")) == 1


async def test_the_standalone_stream_gets_what_either_worker_sends_and_survives_a_cut(scene: Scene) -> None:
    client = scene.client
    call = await client.call("announce", n=10, seconds=0.5)
    await client.event("log", nth=3)
    scene.listening.cut()
    assert (await client.event("response", of="GET", nth=2, status=200))["cursor"] is not None
    await client.event("result", key=call)
    for _ in range(2):
        await client.event("result", key=await client.call("announce", n=5))
    await client.event("log", nth=20)
    told = [log["data"] for log in client.told("log")]
    assert [data["index"] for data in told] == [*range(10), *range(5), *range(5)]
    assert {data["pid"] for data in told} == {worker.pid for worker in scene.workers.members}


async def test_a_cancellation_reaches_the_call_through_the_other_worker(scene: Scene) -> None:
    client = scene.client
    call = await client.call("note_cancellation", key="k")
    await scene.workers.wait_for("k")
    await client.cancel(call)
    async with asyncio.timeout(10):
        while not (scene.workers.directory / "k.cancelled").exists():  # noqa: ASYNC110 (made by another process)
            await asyncio.sleep(0.01)
    await client.event("response", of="notifications/cancelled", status=202)
    assert scene.worker_of("notifications/cancelled") != scene.worker_of("tools/call")
    assert await client.event("error", key=call)


async def test_a_call_that_fails_or_is_cancelled_is_not_asked_for_again(scene: Scene) -> None:
    """This client takes a result, but no error, for the end of a stream, and asks what comes after it."""
    client = scene.client
    failed = await client.request("no/such/method")
    assert (await client.event("error", key=failed))["code"] == -32601
    cancelled = await client.call("note_cancellation", key="k")
    await scene.workers.wait_for("k")
    await client.cancel(cancelled)
    for call in (failed, cancelled):
        final = (await client.event("cursor", key=call, nth=2))["cursor"]
        await client.event("response", of="GET", cursor=final)
    # The client would come back within 50 ms.
    await client.event("result", key=await client.call("count", n=10, seconds=1))
    assert len(client.told("response", of="GET", call=True)) == 2
