"""SIGTERM to one of several workers: responses end cleanly at once, calls go on and are answered elsewhere."""

from __future__ import annotations

import asyncio
import json
import signal
import time

import pytest

from tests.e2e.conftest import StartWorkers
from tests.faults.test_death import final_of, waiting_call
from tests.support.mcp_http import Session

pytestmark = pytest.mark.anyio


async def test_sigterm_ends_responses_cleanly_and_lets_calls_finish(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url, capabilities={"elicitation": {}})
    call, cursor = await waiting_call(workers, session, "k")
    standalone = await session.get()
    await anext(standalone.events())
    await session.call_result("echo", {"text": "known here"}, base_url=workers[1].url)
    workers[0].signal(signal.SIGTERM)
    began = time.monotonic()
    assert await asyncio.wait_for(call.drain(), 2), "The call's response was cut, not ended."
    assert await asyncio.wait_for(standalone.drain(), 2), "The standalone response was cut, not ended."
    assert time.monotonic() - began < 0.5
    resumed = await session.get(cursor, base_url=workers[1].url)
    # The drained worker lives on for its call.
    assert workers[0].running
    workers.release("k")
    final = (await final_of(resumed, 5)).message
    assert final["result"]["content"][0]["text"] == "waited for k"
    async with asyncio.timeout(5):
        await workers[0].process.wait()
    workers.assert_clean_logs()


async def test_a_call_may_ask_and_be_answered_while_its_worker_drains(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url, capabilities={"elicitation": {}})
    call = await session.call("ask_later", {"key": "later"}, progress_token="t")
    first = await anext(call.events())
    await workers.wait_for("later")
    workers[0].signal(signal.SIGTERM)
    assert await asyncio.wait_for(call.drain(), 2)
    resumed = await session.get(first.id, base_url=workers[1].url)
    workers.release("later")
    events = resumed.events()
    async for event in events:
        if event.data and event.message.get("method") == "elicitation/create":
            answer = {"action": "accept", "content": {"answer": "late"}}
            assert await session.answer(event.message["id"], answer, base_url=workers[1].url) == 202
            break
    final = [event async for event in events][-1].message
    assert json.loads(final["result"]["content"][0]["text"])["content"] == {"answer": "late"}


async def test_what_does_not_finish_in_time_ends_with_an_error(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 2, options={"durable": {"drain_timeout": 1}})
    session = await Session.initialize(workers[0].url)
    _, cursor = await waiting_call(workers, session, "never")
    resumed = await session.get(cursor, base_url=workers[1].url)
    workers[0].signal(signal.SIGTERM)
    began = time.monotonic()
    final = (await final_of(resumed, 5)).message
    assert final["error"]["data"] == {"reason": "shutdown"}
    assert 0.8 < time.monotonic() - began < 2.5
    async with asyncio.timeout(5):
        await workers[0].process.wait()


async def test_a_draining_worker_takes_no_new_session(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url)
    call, _ = await waiting_call(workers, session, "k")
    # A connection that is open before the listening socket closes.
    standalone = await session.get(base_url=workers[1].url)
    workers[0].signal(signal.SIGTERM)
    assert await asyncio.wait_for(call.drain(), 2)
    workers.release("k")
    standalone.close()
    async with asyncio.timeout(5):
        assert await workers[0].process.wait() in (0, -signal.SIGTERM)
