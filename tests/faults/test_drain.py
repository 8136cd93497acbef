"""SIGTERM to one of several workers: responses end cleanly at once, calls go on and are answered elsewhere.

Who else may run a worker, and what becomes of its signals, is in `test_drain_servers.py`.
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import time
from collections.abc import Sequence

import pytest

from tests.e2e.conftest import StartWorkers
from tests.faults.test_death import final_of, rows, waiting_call
from tests.support.deployments import deployed
from tests.support.mcp_http import Response, Session, request
from tests.support.until import until

pytestmark = pytest.mark.anyio

PROMPT = 0.1
"""How soon after the signal (seconds) the responses end, by their median."""
LATE = 0.5
"""How late the last of them may end, on a machine that has other things to do."""


async def drained(response: Response) -> tuple[float, bool]:
    """Read a response to its end: when that was, and whether it was a clean one."""
    clean = await asyncio.wait_for(response.drain(), 5)
    return time.monotonic(), clean


def assert_ended_at_once(signalled: float, ends: Sequence[tuple[float, bool]]) -> None:
    """The responses that were attached when the signal came have ended, in order, and soon."""
    assert all(clean for _, clean in ends), f"A response was cut, not ended: {ends}"
    late = [at - signalled for at, _ in ends]
    assert statistics.median(late) < PROMPT, late
    assert max(late) < LATE, late


async def test_sigterm_ends_responses_cleanly_and_lets_calls_finish(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url, capabilities={"elicitation": {}})
    call, cursor = await waiting_call(workers, session, "k")
    counting = [
        await session.call("count", {"n": 200, "seconds": 2}, progress_token=f"c{number}") for number in range(10)
    ]
    standalone = await session.get()
    await anext(standalone.events())
    await session.call_result("echo", {"text": "known here"}, base_url=workers[1].url)
    draining = [asyncio.create_task(drained(response)) for response in (call, standalone, *counting)]
    signalled = time.monotonic()
    workers[0].signal(signal.SIGTERM)
    assert_ended_at_once(signalled, await asyncio.gather(*draining))
    resumed = await session.get(cursor, base_url=workers[1].url)
    # The drained worker lives on for its call.
    assert workers[0].running
    workers.release("k")
    final = (await final_of(resumed, 5)).message
    assert final["result"]["content"][0]["text"] == "waited for k"
    async with asyncio.timeout(5):
        # uvicorn ends by the signal that it was given, once it has done what there was to do.
        assert await workers[0].process.wait() == -signal.SIGTERM
    workers.assert_clean_logs()


async def test_a_stalled_client_does_not_hold_the_drain(migrated: str, start_workers: StartWorkers) -> None:
    """Nor does it move the timer, which starts at the signal: uvicorn waits for connections, and then for the drain."""
    elsewhere = await start_workers("mcpserver_app", 1)
    async with deployed("uvicorn", migrated, drain_timeout=1) as deployment:
        await deployment.until_it_serves(1)
        session = await Session.initialize(deployment.url)
        never = await session.call("wait", {"key": "never"}, progress_token="t", id="never")
        priming = await anext(never.events())
        waiting = await session.get(priming.id, base_url=elsewhere[0].url)
        # More than all buffers on the way hold; the call itself comes to its end.
        arguments = {"n": 200, "size": 65536}
        flood = {"name": "burst", "arguments": arguments, "_meta": {"progressToken": "flood"}}
        message = {"jsonrpc": "2.0", "id": "flood", "method": "tools/call", "params": flood}
        stalled = await request("POST", session.url(), headers=session.headers(), body=message, receive_buffer=4096)
        stalled.abandon()
        ended = "SELECT FROM mcp_events.streams WHERE request_id = '\"flood\"' AND final_seq IS NOT NULL"
        await until(lambda: rows(migrated, ended), 30)
        signalled = time.monotonic()
        deployment.process.send_signal(signal.SIGTERM)
        assert (await final_of(waiting, 5)).message["error"]["data"] == {"reason": "shutdown"}
        assert 0.8 < time.monotonic() - signalled < 2.5
        async with asyncio.timeout(8):
            assert await deployment.process.wait() == -signal.SIGTERM
        # uvicorn's line for a response that could not be ended, since its client takes nothing.
        deployment.assert_clean_logs("did not finish within", "returned without completing response")


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
        assert await workers[0].process.wait() == -signal.SIGTERM
