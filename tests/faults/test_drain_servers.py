"""SIGTERM under what people serve with: uvicorn's supervisor, `serve`, gunicorn, a program of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.faults.test_drain import assert_ended_at_once, drained
from tests.support.deployments import Deployment, deployed, rows_of, runs
from tests.support.following import Following
from tests.support.mcp_http import Session, close_all
from tests.support.until import until
from tests.support.workers import Worker, run_workers

pytestmark = [pytest.mark.slow, pytest.mark.anyio]

DRAIN_TIMEOUT = 3.0
EXPECTED = (r"\d+ calls did not finish within", r"Worker \(pid:\d+\) was sent SIGTERM")


@pytest.fixture(scope="module")
async def elsewhere(migrated_once: str, anyio_backend: str) -> AsyncIterator[Worker]:
    """A worker of another deployment on the same database, which stays up."""
    async with run_workers("mcpserver_app", migrated_once, 1) as workers:
        yield workers[0]
        close_all()


class Clients:
    """Calls at a deployment whose clients resume when their response ends, at `url`."""

    def __init__(self, deployment: Deployment, session: Session) -> None:
        self.deployment = deployment
        self.session = session
        self.url = deployment.url
        self.calls: dict[str, Following] = {}
        self.answers: dict[str, asyncio.Task[Any]] = {}

    async def start(self, tool: str, **arguments: Any) -> Following:
        """Call, and return when the call's first event is there; its id is its key."""
        key = f"{tool}-{len(self.calls)}"
        if tool in ("wait", "ask_later"):
            arguments["key"] = key
        call = Following(self.session, lambda: self.url, key, on_message=self._answer)
        self.calls[key] = call
        self.answers[key] = asyncio.create_task(call.call(tool, arguments))
        await until(lambda: _value(call.events), 20)
        return call

    async def start_on(self, pid: int, tool: str) -> Following:
        """A call that the worker `pid` runs: the kernel chooses, so others may have to be started, and let go."""
        for _ in range(60):
            call = await self.start(tool)
            if await self.runs_on(call) == pid:
                return call
            self.deployment.release(call.request_id)
        raise AssertionError(f"No call came to {pid}.")

    async def runs_on(self, call: Following) -> int:
        """The process that runs a call."""
        query = "SELECT w.pid FROM mcp_events.streams s JOIN mcp_events.workers w ON w.number = s.worker"
        [(pid,)] = await rows_of(self.deployment.dsn, f"{query} WHERE s.number = %s", call.stream)
        return int(pid)

    async def _answer(self, message: Any) -> None:
        if message["method"] == "elicitation/create":
            assert await self.session.answer(message["id"], {"action": "accept", "content": {"answer": "yes"}}) == 202

    async def answer(self, call: Following) -> Any:
        """A call's final message; everything before it came exactly once."""
        async with asyncio.timeout(15):
            final = await self.answers[call.request_id]
        call.assert_exactly_once()
        return final


async def _value(value: object) -> object:
    return value


async def until_resumed(*calls: Following) -> None:
    await until(lambda: _value(all(call.resumes for call in calls)))


async def ended(pid: int) -> bool:
    return not runs(pid)


def text_of(final: Any) -> str:
    return str(final["result"]["content"][0]["text"])


@pytest.mark.parametrize("server", ["uvicorn --workers", "serve --workers", "gunicorn"])
async def test_a_worker_of_several_and_then_all_drain_and_no_client_loses_anything(
    server: str, migrated_once: str, elsewhere: Worker
) -> None:
    async with deployed(server, migrated_once, drain_timeout=DRAIN_TIMEOUT) as deployment:
        first = await deployment.until_it_serves(2)
        session = await Session.initialize(deployment.url, capabilities={"elicitation": {}})
        clients = Clients(deployment, session)
        waiting = await clients.start("wait")
        pid = await clients.runs_on(waiting)
        asking, never = await clients.start_on(pid, "ask_later"), await clients.start_on(pid, "wait")
        counting = [await clients.start("count", n=30, seconds=DRAIN_TIMEOUT / 2) for _ in range(6)]
        drained_with_it = [call for call in counting if await clients.runs_on(call) == pid]

        # One of the workers.
        attached = [call for call in (waiting, asking, never, *drained_with_it) if not call.ends]
        signalled = time.monotonic()
        os.kill(pid, signal.SIGTERM)
        await until_resumed(waiting, asking, never)
        for call in (waiting, asking):
            deployment.release(call.request_id)
        assert text_of(await clients.answer(waiting)) == f"waited for {waiting.request_id}"
        assert json.loads(text_of(await clients.answer(asking)))["content"] == {"answer": "yes"}
        assert json.loads(text_of(await clients.answer(asking)))["pid"] == pid
        for call in counting:
            assert text_of(await clients.answer(call)) == "counted 30"
        assert (await clients.answer(never))["error"]["data"] == {"reason": "shutdown"}
        # The timer started at the signal, not when uvicorn got round to it.
        assert DRAIN_TIMEOUT - 0.2 < time.monotonic() - signalled < DRAIN_TIMEOUT + 2
        assert_ended_at_once(signalled, [call.ends[0] for call in attached])
        await until(lambda: ended(pid), 5)

        # Whoever supervises has put another one in its place, which serves the session too.
        second = await deployment.until_it_serves(2)
        assert set(second) - set(first) and pid not in second
        await clients.start_on((set(second) - set(first)).pop(), "wait")

        # All of them.
        last = await clients.start("wait")
        standalone = await session.get(base_url=deployment.url)
        await anext(standalone.events())
        standalone_end = asyncio.create_task(drained(standalone))
        clients.url = elsewhere.url
        signalled = time.monotonic()
        ending = asyncio.create_task(deployment.ended_by(signal.SIGTERM, within=DRAIN_TIMEOUT + 6))
        await until_resumed(last)
        for key in clients.calls:
            deployment.release(key)
        assert text_of(await clients.answer(last)) == f"waited for {last.request_id}"
        assert await ending == 0
        assert all([await ended(pid) for pid in (*first, *second)])
        # uvicorn's supervisor looks at its signals twice a second, and first asks its workers how they are.
        for at, clean in (last.ends[0], await standalone_end):
            assert clean and at - signalled < 2.0
        deployment.assert_clean_logs(*EXPECTED)
    await assert_ended_as_shutdown(migrated_once, {*first, *second})


async def assert_ended_as_shutdown(dsn: str, pids: set[int]) -> None:
    reasons = await rows_of(dsn, "SELECT pid, ended_reason FROM mcp_events.workers WHERE pid = ANY(%s)", list(pids))
    assert dict(reasons) == dict.fromkeys(pids, "shutdown")


async def test_a_program_that_handles_signals_itself_drains_by_calling_the_store(
    migrated_once: str, elsewhere: Worker
) -> None:
    async with deployed("thread", migrated_once, drain_timeout=DRAIN_TIMEOUT) as deployment:
        await deployment.until_it_serves(1)
        session = await Session.initialize(deployment.url, capabilities={"elicitation": {}})
        clients = Clients(deployment, session)
        waiting, asking, never = [await clients.start(tool) for tool in ("wait", "ask_later", "wait")]
        clients.url = session.base_url = elsewhere.url
        signalled = time.monotonic()
        ending = asyncio.create_task(deployment.ended_by(signal.SIGTERM, within=DRAIN_TIMEOUT + 6))
        await until_resumed(waiting, asking, never)
        for call in (waiting, asking):
            deployment.release(call.request_id)
        assert text_of(await clients.answer(waiting)) == f"waited for {waiting.request_id}"
        assert json.loads(text_of(await clients.answer(asking)))["content"] == {"answer": "yes"}
        assert (await clients.answer(never))["error"]["data"] == {"reason": "shutdown"}
        assert DRAIN_TIMEOUT - 0.2 < time.monotonic() - signalled < DRAIN_TIMEOUT + 2
        assert await ending == 0
        assert_ended_at_once(signalled, [call.ends[0] for call in (waiting, asking, never)])
        deployment.assert_clean_logs(*EXPECTED)
        pid = deployment.process.pid
    await assert_ended_as_shutdown(migrated_once, {pid})
