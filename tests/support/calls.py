"""Calls that are under way while a test does something to their server, and how requests may be refused meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable
from typing import Any, Self

from tests.support.mcp_http import LATEST, Response, Session
from tests.support.resuming import split_id
from tests.support.servers import Server
from tests.support.sse import Event
from tests.support.workers import SUSPICIOUS, Worker, Workers

QUICKLY = 3.0
"""How long the refusal of a POST may take while the database is away, in seconds: 2, and a busy machine."""

DELETED = 7.0
"""How long that of a DELETE may: it waits for appends that are under way."""


class Counting:
    """A call of `count`, whose response is read as it comes."""

    def __init__(self, session: Session, response: Response, n: int) -> None:
        self.session = session
        self.response = response
        self.n = n
        self.events: list[Event] = []
        self._arrived = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, session: Session, n: int = 100, seconds: float = 2.0, *, base_url: str | None = None) -> Self:
        """Call, and return when its first event is there."""
        token = f"t{session.next_id()}"
        response = await session.call(
            "count", {"n": n, "seconds": seconds}, progress_token=token, id=token, base_url=base_url
        )
        assert response.status == 200, await response.read()
        call = cls(session, response, n)
        await call.until(1)
        return call

    async def _read(self) -> None:
        async for event in self.response.events():
            if event.data:
                self.events.append(event)
                self._arrived.set()

    @property
    def cursor(self) -> str:
        """The id of the last event that came."""
        return self.events[-1].id or ""

    @property
    def keep_alives(self) -> int:
        return len(self.response.comments)

    async def until(self, events: int) -> None:
        """Return when so many events have come."""
        async with asyncio.timeout(20):
            while len(self.events) < events:
                assert not self._reading.done(), f"The response ended after {len(self.events)} events."
                self._arrived.clear()
                await self._arrived.wait()

    def cut(self) -> str:
        """Lose the connection; the id to resume from."""
        self._reading.cancel()
        self.response.cut()
        return self.cursor

    async def resumed(self, response: Response) -> None:
        """Go on with the response of a GET."""
        assert response.status == 200, await response.read()
        self.response = response
        self._reading = asyncio.create_task(self._read())

    async def ended(self, timeout: float = 20.0) -> None:
        """Return when the response has ended, cleanly."""
        async with asyncio.timeout(timeout):
            await self._reading
        assert self.response.complete

    async def finished(self, timeout: float = 20.0) -> None:
        """The response comes to its end, and has brought everything, once and in order."""
        await self.ended(timeout)
        ids = [split_id(event.id or "") for event in self.events]
        assert [seq for _, seq in ids] == list(range(1, self.n + 2)), ids
        assert len({stream for stream, _ in ids}) == 1, ids
        messages = [event.message for event in self.events]
        assert [int(message["params"]["message"]) for message in messages[:-1]] == list(range(self.n))
        assert "result" in messages[-1], messages[-1]


async def initialize(base_url: str) -> Response:
    """POST `initialize`, whatever the answer."""
    params = {"protocolVersion": LATEST, "capabilities": {}, "clientInfo": {"name": "test-client", "version": "0"}}
    return await Session(base_url).request("initialize", params, id=0)


async def assert_refused(what: str, sending: Awaitable[Response], within: float = QUICKLY) -> None:
    """The database is away: 503, when to come back, and a JSON-RPC error, soon."""
    began = time.monotonic()
    response = await sending
    took = time.monotonic() - began
    body: Any = await response.json()
    assert response.status == 503, (what, response.status, body)
    assert int(response.headers["retry-after"]) >= 1
    assert body["id"] is None and body["error"]["code"] == -32603, body
    assert took < within, f"{what} took {took:.1f} s."


async def assert_posts_refused(
    session: Session, base_url: str, within: float = QUICKLY, *, notifications: bool = True
) -> None:
    """Every kind of POST, all at once; without `notifications` those that one which takes no writes can serve."""
    sending = {
        "A call": session.call("echo", {"text": "no"}, base_url=base_url),
        "initialize": initialize(base_url),
    }
    if notifications:
        message = {"jsonrpc": "2.0", "method": "notifications/roots/list_changed"}
        sending["A notification"] = session.post(message, base_url=base_url)
        sending["An answer"] = session.post({"jsonrpc": "2.0", "id": "w1.1.1", "result": {}}, base_url=base_url)
    async with asyncio.TaskGroup() as group:
        for what, one in sending.items():
            group.create_task(assert_refused(what, one, within))


async def assert_serving(session: Session, base_url: str) -> None:
    """Old and new sessions are served at the first attempt."""
    assert await session.call_result("echo", {"text": "on"}, base_url=base_url) == "on"
    new = await Session.initialize(base_url)
    assert await new.call_result("echo", {"text": "new"}) == "new"
    assert (await new.delete()).status == 200


async def assert_sound(server: Server, *, failed_over: bool = False) -> None:
    """The log has no gap, no number twice, and nothing after a final.

    Since a failover may have lost some, the numbers of standalone streams skip over what might have been given.
    """
    broken = await server.execute(
        """
        SELECT e.stream, count(*), min(e.seq), max(e.seq), t.final_seq
          FROM mcp_events.events e LEFT JOIN mcp_events.streams t ON t.number = e.stream
         GROUP BY e.stream, t.final_seq, t.request_key
        HAVING count(DISTINCT e.seq) <> count(*) OR max(e.seq) > t.final_seq
            OR (min(e.seq) <> 1 OR max(e.seq) <> count(*)) AND NOT (%s AND t.request_key IS NULL)
        """,
        failed_over,
    )
    assert broken == []


def complaints(worker: Worker) -> list[str]:
    """What a worker wrote of warnings and errors since the test began, a line each, without times and addresses."""
    lines = [line for line in worker.output().splitlines() if SUSPICIOUS.search(line)]
    return [re.sub(r"\[[^]]*\]|0x[0-9a-f]+|\s+\S+\.py:\d+", "", line).strip() for line in lines]


async def flow(workers: Workers, here: Worker, there: Worker) -> None:
    """All that a session may do, on two workers: calls at once, a cut and a resumption, a question, its end."""
    session = await Session.initialize(here.url, capabilities={"elicitation": {}})
    standalone = await session.get(base_url=there.url)
    await anext(standalone.events())
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(_assert_echo(session, (here, there)[number % 2].url))
    counting = await Counting.start(session, n=50, seconds=1)
    await counting.resumed(await session.get(counting.cut(), base_url=there.url))
    await counting.finished()
    asking = await session.call("ask", {"question": "who?"})
    events = asking.events()
    async for event in events:
        if event.data and event.message.get("method") == "elicitation/create":
            answer = {"action": "accept", "content": {"answer": "me"}}
            assert await session.answer(event.message["id"], answer, base_url=there.url) == 202
            break
    [final] = [event.message async for event in events]
    assert json.loads(final["result"]["content"][0]["text"])["content"] == {"answer": "me"}
    await session.call("note_cancellation", {"key": f"{session.session_id}"}, id="endless")
    await workers.wait_for(f"{session.session_id}")
    cancelled = {"requestId": "endless"}
    assert await session.notify("notifications/cancelled", cancelled, base_url=there.url) == 202
    async with asyncio.timeout(5):
        while not (workers.directory / f"{session.session_id}.cancelled").exists():  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.01)
    assert (await session.delete(base_url=there.url)).status == 200
    assert (await session.call("echo", {"text": "gone"})).status == 404
    assert await asyncio.wait_for(standalone.drain(), 5)


async def _assert_echo(session: Session, base_url: str) -> None:
    assert await session.call_result("echo", {"text": "on"}, base_url=base_url) == "on"
