"""A session is its principal's alone, on every worker; to another one it is as unknown as one that never was.

Alike in status, headers and body, byte for byte but for the date, and in the time that the answer takes (invariant 9).
"""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest

from tests.e2e.conftest import SharedWorkers
from tests.servers.tokens import TOKENS
from tests.support.kept import Answer, KeptConnection
from tests.support.mcp_http import LATEST, Response, Session
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio

MODULES = ["auth_mcpserver_app", "auth_fastmcp_app"]
STRANGERS = ["ann-by-another-client", "ann-of-another-issuer", "bob"]

PAIRS = 2000
"""How often each kind of request is timed, for the stranger's and for the unknown session."""

TOLERANCE = 0.05
ATTEMPTS = 3


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@dataclass(frozen=True, slots=True)
class Anns:
    """Ann's session with a call (id 7) that runs on the first worker, and the id of its first event."""

    workers: Workers
    session: Session
    call: Response
    event_id: str

    @property
    def requests(self) -> dict[str, tuple[str, dict[str, str], Any]]:
        """One request of every kind: its method, headers and message."""
        resume = {"Last-Event-ID": self.event_id}
        cancelled = {"method": "notifications/cancelled", "params": {"requestId": 7}}
        answer: dict[str, Any] = {"id": f"w1.1.{self.session.session_id}", "result": {}}
        return {
            "request": ("POST", {}, {"jsonrpc": "2.0", "id": 1, "method": "ping"}),
            "the running request's id": ("POST", {}, {"jsonrpc": "2.0", "id": 7, "method": "ping"}),
            "initialize": ("POST", {}, {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}}),
            "notification": ("POST", {}, {"jsonrpc": "2.0", "method": "notifications/roots/list_changed"}),
            "answer": ("POST", {}, {"jsonrpc": "2.0"} | answer),
            "cancel": ("POST", {}, {"jsonrpc": "2.0"} | cancelled),
            "get": ("GET", {}, None),
            "resume": ("GET", resume, None),
            "resume from nowhere": ("GET", {"Last-Event-ID": "no-event-id"}, None),
            "delete": ("DELETE", {}, None),
        }


@pytest.fixture
async def anns(request: pytest.FixtureRequest, shared_workers: SharedWorkers) -> AsyncIterator[Anns]:
    workers = await shared_workers(request.param)
    session = await Session.initialize(workers[0].url, headers=bearer("ann"))
    call = await session.call("wait", {"key": "k"}, id=7, progress_token="t")
    async for event in call.events():
        if event.data:
            break
    await workers.wait_for("k")
    yield Anns(workers, session, call, event.id or "")
    workers.release("k")


def asking(url: str, token: str) -> KeptConnection:
    """Requests of whoever has `token`, who names the session in each."""
    accept = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": LATEST}
    return KeptConnection(f"{url}/mcp", accept | bearer(token))


def of_session(session_id: str | None, headers: dict[str, str]) -> dict[str, str]:
    return {"Mcp-Session-Id": session_id or ""} | headers


@pytest.mark.parametrize("anns", MODULES, indirect=True)
async def test_another_principal_gets_what_an_unknown_session_gets(anns: Anns) -> None:
    for worker in anns.workers.members:
        for token in STRANGERS:
            async with asking(worker.url, token) as connection:
                for kind, (method, headers, message) in anns.requests.items():
                    answers: list[Answer] = []
                    for session_id in (anns.session.session_id, uuid4().hex):
                        encoded = connection.encode(method, of_session(session_id, headers), message)
                        answers.append(await connection.send(encoded))
                    theirs, unknown = answers
                    assert theirs.status == 404, (kind, token)
                    assert (theirs.head, theirs.body) == (unknown.head, unknown.body), (kind, token)
                    assert anns.session.session_id not in f"{theirs.head!r} {theirs.body!r}"
    # Nothing of it touched the session: the call was neither cancelled nor read away.
    anns.workers.release("k")
    events = [event async for event in anns.call.events()]
    assert events[-1].message["result"]["content"][0]["text"] == "waited for k"
    anns.workers.assert_clean_logs()


@pytest.mark.parametrize("anns", MODULES, indirect=True)
async def test_the_principal_is_served_on_every_worker_with_whatever_token(anns: Anns) -> None:
    for worker in anns.workers.members:
        for token in ("ann", "ann-renewed"):
            anns.session.extra_headers = bearer(token)
            assert await anns.session.call_result("echo", {"text": token}, base_url=worker.url) == token
            resumed = await anns.session.get(anns.event_id, base_url=worker.url)
            assert resumed.status == 200
            resumed.close()
        anns.session.extra_headers = bearer("nobody's")
        assert (await anns.session.call("echo", {"text": "x"}, base_url=worker.url)).status == 401
    anns.session.extra_headers = bearer("ann-renewed")
    cancelled = await anns.session.notify("notifications/cancelled", {"requestId": 7}, base_url=anns.workers[1].url)
    assert cancelled == 202
    last = await anns.session.get(anns.event_id)
    assert (await last.messages())[-1]["error"]["code"] == -32800
    assert (await anns.session.delete(base_url=anns.workers[1].url)).status == 200


async def test_everybody_has_sessions_of_their_own_on_one_server(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("auth_mcpserver_app")
    sessions = {token: await Session.initialize(workers[0].url, headers=bearer(token)) for token in TOKENS}
    for token, session in sessions.items():
        assert await session.call_result("echo", {"text": token}, base_url=workers[1].url) == token
    workers.assert_clean_logs()


@pytest.mark.slow
@pytest.mark.parametrize("anns", MODULES[:1], indirect=True)
async def test_another_principal_waits_as_long_as_for_an_unknown_session(anns: Anns) -> None:
    """Medians over interleaved requests, the order within a pair turning. A kind that seems apart is timed again."""
    timed = {kind: anns.requests[kind] for kind in ("request", "cancel", "resume", "delete")}
    async with asking(anns.workers[0].url, "bob") as connection:
        for kind, (method, headers, message) in timed.items():
            ratios = []
            for _ in range(ATTEMPTS):
                ratios.append(await ratio_of_medians(connection, anns.session.session_id, method, headers, message))
                if abs(ratios[-1] - 1) <= TOLERANCE:
                    break
            print(f"{kind}: a stranger's took {ratios[-1]:.3f} of an unknown session's")
            assert abs(ratios[-1] - 1) <= TOLERANCE, (kind, ratios)


async def ratio_of_medians(
    connection: KeptConnection, session_id: str | None, method: str, headers: dict[str, str], message: Any
) -> float:
    """The median time of requests for `session_id` over that of requests for sessions that are none."""
    theirs = connection.encode(method, of_session(session_id, headers), message)
    times: tuple[list[int], list[int]] = ([], [])
    gc.disable()
    try:
        for pair in range(PAIRS):
            unknown = connection.encode(method, of_session(uuid4().hex, headers), message)
            for which in (0, 1) if pair % 2 else (1, 0):
                answer = await connection.send((theirs, unknown)[which])
                assert answer.status == 404
                times[which].append(answer.nanoseconds)
    finally:
        gc.enable()
    await asyncio.sleep(0)
    return statistics.median(times[0]) / statistics.median(times[1])
