"""A program on stdio behind two replicas of the proxy, over one database: each takes every request of every session."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from mcp import Client
from mcp.client.context import ClientRequestContext
from mcp_types import (
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequestParams,
    ElicitResult,
    TextContent,
)

from tests.e2e.conftest import SharedWorkers, StartWorkers
from tests.support.mcp_http import Response, Session
from tests.support.processes import gone, made
from tests.support.resuming import ResumingCall
from tests.support.sdk_client import sdk_session
from tests.support.sse import Event
from tests.support.until import until

pytestmark = pytest.mark.anyio


async def messages_until(response: Response, method: str) -> tuple[AsyncIterator[Event], list[Any]]:
    """The messages of a stream up to the first one of a method, and its events from there on."""
    events, messages = response.events(), []
    async for event in events:
        if event.data:
            messages.append(event.message)
            if event.message.get("method") == method:
                return events, messages
    raise AssertionError(f"The stream ended without {method}: {messages}")


async def rest(events: AsyncIterator[Event]) -> list[Any]:
    async with asyncio.timeout(20):
        return [event.message async for event in events if event.data]


async def test_calls_cut_at_random_and_resumed_on_any_replica_lose_and_double_nothing(
    shared_workers: SharedWorkers,
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    rng = random.Random(5)
    arguments = {"n": 60, "seconds": 2.0}
    calls = [
        ResumingCall(session, workers.urls, random.Random(rng.random()), 60, arguments=arguments, cuts=4)
        for _ in range(8)
    ]
    await asyncio.gather(*(call.run() for call in calls))
    for call in calls:
        call.assert_exactly_once()
    workers.assert_clean_logs()


async def test_what_a_client_sends_through_both_replicas_reaches_the_program_in_its_order(
    shared_workers: SharedWorkers,
) -> None:
    """Each message is answered before the next one is sent; those that travel must not come later than those that do
    not."""
    workers = await shared_workers("stdio_app")
    sent = []
    session = await Session.initialize(workers[0].url, initialized=False)
    assert await session.notify("notifications/initialized", base_url=workers[1].url) == 202
    for number in range(40):
        sent.append(f"notifications/{number}")
        assert await session.notify(sent[-1], base_url=workers[(number + 1) % 2].url) == 202
    received = json.loads(await session.call_result("received", base_url=workers[0].url))
    assert received == ["initialize", "notifications/initialized", *sent]


@pytest.mark.parametrize(("asked_at", "answered_at"), [(0, 0), (0, 1), (1, 0), (1, 1)])
async def test_a_question_in_a_call_reaches_its_client_and_the_answer_the_program(
    asked_at: int, answered_at: int, shared_workers: SharedWorkers
) -> None:
    """Nobody reads the standalone stream here."""
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url, capabilities={"elicitation": {}})
    response = await session.call("ask", {"question": "well?"}, base_url=workers[asked_at].url)
    events, messages = await messages_until(response, "elicitation/create")
    assert messages[-1]["params"]["message"] == "well?"
    result = {"action": "accept", "content": {"answer": "yes"}}
    assert await session.answer(messages[-1]["id"], result, base_url=workers[answered_at].url) == 202
    [final] = await rest(events)
    assert json.loads(final["result"]["content"][0]["text"]) == {"answer": "yes"}


async def test_progress_goes_by_its_token_and_what_names_no_call_to_the_newest(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    old = await session.call("count", {"n": 20, "seconds": 1.0}, progress_token=1, id="old")
    young = await session.call("count", {"n": 20, "seconds": 1.0}, progress_token="1", base_url=workers[1].url)
    logs = await session.call("logs", {"n": 3}, base_url=workers[1].url)
    for response, token in ((old, 1), (young, "1")):
        *progress, final = await response.messages()
        assert [message["params"]["progressToken"] for message in progress] == [token] * 20
        assert final["result"]["content"][0]["text"] == "counted 20"
    *logged, final = await logs.messages()
    assert [message["params"]["data"] for message in logged] == [0, 1, 2]
    assert "result" in final


async def test_what_comes_while_no_call_runs_is_on_the_standalone_stream_of_any_replica(
    shared_workers: SharedWorkers,
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url, capabilities={"roots": {}})
    standalone = await session.get(base_url=workers[1].url)
    events = standalone.events()
    async with asyncio.timeout(10):
        messages = [event.message async for event in events if event.data and (await events.aclose() or True)]
    assert messages == [{"jsonrpc": "2.0", "id": "roots", "method": "roots/list"}]


@pytest.mark.parametrize("request_id", ["7", 7, "a" * 200, 2**60, "1_2", ""])
async def test_an_answer_carries_the_id_as_its_client_wrote_it(
    request_id: object, shared_workers: SharedWorkers
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    for url in workers.urls:
        final = await (await session.call("echo", {"text": "x"}, id=request_id, base_url=url)).result()
        assert (final["id"], type(final["id"])) == (request_id, type(request_id))


@pytest.mark.parametrize("through", [0, 1])
async def test_a_cancellation_reaches_the_program_and_ends_the_call(
    through: int, shared_workers: SharedWorkers
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    response = await session.call("wait", {"key": "cancel"}, progress_token="t", id=7, base_url=workers[1].url)
    await workers.wait_for("cancel")
    assert await session.notify("notifications/cancelled", {"requestId": 7}, base_url=workers[through].url) == 202
    final = await response.result()
    assert (final["id"], final["error"]["code"]) == (7, -32800)
    await until(lambda: made(workers.directory / "cancel.cancelled"))
    # Its id may be used again, and what the program answers to the old request now is nobody's.
    workers.release("cancel")
    assert await session.call_result("echo", {"text": "on"}) == "on"


async def test_delete_on_another_replica_ends_the_program_politely(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    pid = json.loads(await session.call_result("whoami"))["pid"]
    running = await session.call("wait", {"key": "never"}, progress_token="t", base_url=workers[1].url)
    await workers.wait_for("never")
    assert (await session.delete(base_url=workers[1].url)).status == 200
    assert (await running.result())["error"]["data"] == {"reason": "session_ended"}
    for url in workers.urls:
        assert (await session.call("echo", {"text": "x"}, base_url=url)).status == 404
        assert await session.notify("notifications/1", base_url=url) == 404
        assert (await session.get(base_url=url)).status == 404
    await until(lambda: made(workers.directory / f"{pid}.left"))
    await until(lambda: gone(pid))


async def test_requests_without_a_session_of_their_own_are_refused_on_any_replica(
    shared_workers: SharedWorkers,
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    waiting = await session.call("wait", {"key": "busy"}, progress_token="t", id=7, base_url=workers[1].url)
    await workers.wait_for("busy")
    for url in workers.urls:
        assert (await session.call("echo", {"text": "x"}, id="7", base_url=url)).status == 409
    modern = await session.post(
        {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, headers={"MCP-Protocol-Version": "2026-07-28"}
    )
    assert modern.status == 400
    error = (await modern.json())["error"]
    assert error["code"] == -32022
    assert "2025-11-25" in error["data"]["supported"]
    session.session_id = "0" * 32
    for url in workers.urls:
        assert (await session.call("echo", {"text": "x"}, base_url=url)).status == 404
    workers.release("busy")
    assert "result" in await waiting.result()


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_client_of_both_eras_finds_the_one_that_is_served(mode: str, shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("stdio_app")
    async with Client(f"{workers[0].url}/mcp", mode=mode) as client:
        assert (await client.call_tool("echo", {"text": "hello"})).content[0].text == "hello"


async def test_a_session_is_its_openers_alone(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 2, options={"owner_header": "x-owner"})
    session = await Session.initialize(workers[0].url, headers={"x-owner": "one"})
    session.extra_headers = {"x-owner": "two"}
    for url in workers.urls:
        assert (await session.call("echo", {"text": "x"}, base_url=url)).status == 404
        assert await session.notify("notifications/1", base_url=url) == 404
        assert (await session.delete(base_url=url)).status == 404
    session.extra_headers = {"x-owner": "one"}
    assert await session.call_result("echo", {"text": "on"}, base_url=workers[1].url) == "on"


async def test_the_sdks_client_is_asked_and_answers_while_its_requests_go_to_random_replicas_and_are_cut(
    shared_workers: SharedWorkers,
) -> None:
    workers = await shared_workers("stdio_app")

    async def sample(context: ClientRequestContext, params: CreateMessageRequestParams) -> CreateMessageResult:
        return CreateMessageResult(role="assistant", content=TextContent(type="text", text="sampled"), model="m")

    async def elicit(context: ClientRequestContext, params: ElicitRequestParams) -> ElicitResult:
        return ElicitResult(action="accept", content={"answer": params.message})

    indices: list[str] = []

    async def progress(number: float, total: float | None, message: str | None) -> None:
        indices.append(str(message))

    async with sdk_session(
        workers.urls, random.Random(3), cuts=3, sampling_callback=sample, elicitation_callback=elicit
    ) as (client, transport):
        for number in range(6):
            asked = await client.call_tool("ask", {"question": str(number)})
            assert json.loads(asked.content[0].text) == {"answer": str(number)}
            sampled = await client.call_tool("sample", {"text": "?"})
            assert json.loads(sampled.content[0].text)["text"] == "sampled"
        counted = await client.call_tool("count", {"n": 30, "seconds": 1.5}, progress_callback=progress)
        assert counted.content[0].text == "counted 30"
        assert indices == [str(number) for number in range(30)]
    assert len({sent.worker for sent in transport.sent}) == 2
    assert sum(sent.cut is not None for sent in transport.sent) >= 3
