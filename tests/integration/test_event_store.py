"""The SDK's `EventStore` for one session, and the refusal to be one for all (invariants 3, 4, 9 and 11)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.streamable_http import EventMessage, EventStore, StreamableHTTPServerTransport
from mcp_types import JSONRPCError, JSONRPCMessage, JSONRPCNotification, JSONRPCResponse
from starlette.types import Receive, Scope, Send

from mcp_pg_events import PostgresStore, event_store
from mcp_pg_events.errors import ConfigurationError, Error, StoreClosed
from tests.support.deaf_proxy import DeafProxy, dsn_through, target_of
from tests.support.log import open_session, query, running
from tests.support.mcp_http import Session
from tests.support.serving import serving

pytestmark = pytest.mark.anyio


def note(index: int) -> JSONRPCNotification:
    return JSONRPCNotification(jsonrpc="2.0", method="notifications/message", params={"index": index})


def result(request_id: int = 1) -> JSONRPCResponse:
    return JSONRPCResponse(jsonrpc="2.0", id=request_id, result={"done": True})


class Received:
    """What a replay sent, and a wait for it."""

    def __init__(self) -> None:
        self.messages: list[tuple[str | None, JSONRPCMessage]] = []
        self._changed = asyncio.Event()

    async def __call__(self, event: EventMessage) -> None:
        self.messages.append((event.event_id, event.message))
        self._changed.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self.messages) < count:
                self._changed.clear()
                await self._changed.wait()


async def replayed(events: EventStore, last_event_id: str) -> list[tuple[str | None, JSONRPCMessage]]:
    """All that follows an id, in a stream that has ended."""
    received = Received()
    # None: otherwise the SDK would hold the response open for what follows.
    assert await asyncio.wait_for(events.replay_events_after(last_event_id, received), 5) is None
    return received.messages


async def filled(events: EventStore, name: str, count: int = 5) -> list[tuple[str, JSONRPCMessage]]:
    """A stream of some notes and a result: ids and messages."""
    messages: list[JSONRPCMessage] = [*(note(index) for index in range(count)), result()]
    return [(await events.store_event(name, message), message) for message in messages]


async def test_what_follows_an_id_is_replayed_and_ends_with_the_final(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (store, other):
        session = uuid4().hex
        everything = await filled(store.for_session(session), "1")
        assert len({event_id for event_id, _ in everything}) == 6
        for worker in (store, other):
            for place, (event_id, _) in enumerate(everything, 1):
                assert await replayed(worker.for_session(session), event_id) == everything[place:]


async def test_a_replay_goes_on_live_until_the_final_whoever_stores_it(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (store, other):
        session = uuid4().hex
        here, there = store.for_session(session), other.for_session(session)
        first = await here.store_event("1", note(0))
        received = Received()
        replaying = asyncio.create_task(here.replay_events_after(first, received))
        stored: list[tuple[str, JSONRPCMessage]] = []
        for index in range(1, 7):
            message = note(index)
            stored.append((await (here, there)[index % 2].store_event("1", message), message))
            await received.until(index)
        assert not replaying.done()
        stored.append((await there.store_event("1", result()), result()))
        assert await asyncio.wait_for(replaying, 5) is None
        assert received.messages == stored


async def test_a_cursor_before_the_first_event_replays_everything(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,):
        events = store.for_session(uuid4().hex)
        priming = await events.store_event("1", None)
        everything = await filled(events, "1", 3)
        assert await replayed(events, priming) == everything
        # In the middle of a stream it is the place of the last event.
        second = await events.store_event("2", note(0))
        assert await events.store_event("2", None) == second


async def test_a_name_that_is_used_again_after_its_final_is_a_new_stream(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (store, other):
        session = uuid4().hex
        first = await filled(store.for_session(session), "1", 1)
        second = await filled(other.for_session(session), "1", 2)
        assert await replayed(store.for_session(session), first[0][0]) == first[1:]
        assert await replayed(store.for_session(session), second[0][0]) == second[1:]
        assert not {event_id for event_id, _ in first} & {event_id for event_id, _ in second}


async def test_workers_that_store_into_one_stream_keep_it_whole(migrated_once: str) -> None:
    async with running(migrated_once, 2) as stores:
        session = uuid4().hex
        priming = await stores[0].for_session(session).store_event("1", None)
        events = [store.for_session(session) for store in stores]
        ids = await asyncio.gather(*(events[n % 2].store_event("1", note(n)) for n in range(40)))
        await events[0].store_event("1", result())
        found = await replayed(events[1], priming)
        assert sorted(ids) == sorted(event_id for event_id, _ in found[:-1] if event_id)
        stream = priming.partition("-")[0]
        assert [event_id for event_id, _ in found] == [f"{stream}-{seq}" for seq in range(1, 42)]


async def test_two_sessions_with_the_same_stream_names_do_not_meet(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (store, other):
        sessions = [uuid4().hex, uuid4().hex]
        mine, theirs = [await filled(store.for_session(session), "7", 2 + n) for n, session in enumerate(sessions)]
        for worker in (store, other):
            assert await replayed(worker.for_session(sessions[0]), mine[0][0]) == mine[1:]
            assert await replayed(worker.for_session(sessions[1]), theirs[0][0]) == theirs[1:]
            for foreign, session in ((theirs, sessions[0]), (mine, sessions[1])):
                with pytest.raises(Error, match="unknown in this session"):
                    await replayed(worker.for_session(session), foreign[0][0])


async def test_a_durable_apps_session_is_out_of_reach(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,):
        key, opened = await open_session(store)
        with pytest.raises(Error, match="unknown in this session"):
            await replayed(store.for_session(key.session_id), f"{opened.stream.number}-0")


async def test_an_id_that_cannot_be_resumed_from_raises_and_says_which_kind(migrated_once: str) -> None:
    async with running(migrated_once, 1) as (store,):
        session = uuid4().hex
        events = store.for_session(session)
        everything = await filled(events, "1")
        number = int(everything[0][0].partition("-")[0])
        cases = [(text, "malformed") for text in ("", "1", "_GET_stream", "-1--1", "1-1 ", "9" * 40 + "-1")]
        cases += [(text, "unknown") for text in (f"{number}-7", f"{number + 10**6}-1", f"{2**63 - 1}-0", "0-0")]
        # As retention leaves it: the first three events went with their partition.
        query(migrated_once, "DELETE FROM events WHERE stream = %s AND seq <= 3", number)
        query(migrated_once, "UPDATE streams SET floor = 3 WHERE number = %s", number)
        cases += [(event_id, "expired") for event_id in (f"{number}-0", everything[0][0], everything[1][0])]
        for event_id, kind in cases:
            with pytest.raises(Error, match=kind):
                await replayed(events, event_id)
        assert await replayed(events, everything[2][0]) == everything[3:]
        with pytest.raises(Error, match="unknown"):
            await replayed(store.for_session(uuid4().hex), everything[2][0])


@pytest.mark.parametrize("told", [True, False])
async def test_the_newest_replay_wins_on_any_worker(
    told: bool, migrated_once: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the notification of it is lost."""
    monkeypatch.setattr(event_store, "POLL_INTERVAL", 60 if told else 0.2)
    async with DeafProxy.to(*target_of(migrated_once)) as proxy, running(migrated_once, 1) as (other,):
        assert isinstance(proxy, DeafProxy)
        async with PostgresStore(migrated_once, listen_dsn=dsn_through(proxy, migrated_once)) as store:
            session = uuid4().hex
            events = store.for_session(session)
            first = await events.store_event("1", note(0))
            old, new = Received(), Received()
            older = asyncio.create_task(events.replay_events_after(first, old))
            await events.store_event("1", note(1))
            await old.until(1)
            proxy.deaf = not told
            newer = asyncio.create_task(other.for_session(session).replay_events_after(first, new))
            await new.until(1)
            assert await asyncio.wait_for(older, 5) is None
            await events.store_event("1", result())
            assert await asyncio.wait_for(newer, 5) is None
            assert (len(old.messages), len(new.messages)) == (1, 2)


async def test_what_is_stored_comes_back_as_it_was(migrated_once: str) -> None:
    texts = ["before\u0000after", 'it\'s "quoted" \\', "\u2028\r\n\ndata: x", "\U0001f9ea" * 1000]
    async with running(migrated_once, 1) as (store,):
        events = store.for_session('a session\'s "id" \u00e4')
        for name in ["1", '"1"', "_GET_stream", "x" * 10_000, "\u0000", ""]:
            priming = await events.store_event(name, None)
            messages: list[JSONRPCMessage] = [
                JSONRPCNotification(jsonrpc="2.0", method="m", params={"text": text}) for text in texts
            ]
            error = {"jsonrpc": "2.0", "id": name, "error": {"code": -1, "message": "x"}}
            messages.append(JSONRPCError.model_validate(error))
            for message in messages:
                await events.store_event(name, message)
            assert [message for _, message in await replayed(events, priming)] == messages


async def test_a_session_needs_an_id_and_the_store_has_to_be_open(migrated_once: str) -> None:
    store = PostgresStore(migrated_once)
    for session_id in ("", "a\0b"):
        with pytest.raises(ConfigurationError):
            store.for_session(session_id)
    events = store.for_session("fine")
    with pytest.raises(StoreClosed):
        await events.store_event("1", note(0))
    with pytest.raises(StoreClosed):
        await events.replay_events_after("1-1", Received())


# In the SDK


@contextlib.asynccontextmanager
async def own_transport(store: PostgresStore, session_id: str) -> AsyncIterator[str]:
    """One session of an app that wires the SDK's transport itself, and its URL."""
    server = MCPServer("own wiring")
    go_on = asyncio.Event()

    @server.tool()
    async def count(ctx: Context) -> str:  # type: ignore[type-arg]
        for index in range(6):
            if index == 3:
                await go_on.wait()
            await ctx.report_progress(index, 6, str(index))
        return "counted"

    @server.tool()
    async def release() -> str:
        go_on.set()
        return "released"

    lowlevel: Server[Any] = server._lowlevel_server
    transport = StreamableHTTPServerTransport(session_id, event_store=store.for_session(session_id))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await transport.handle_request(scope, receive, send)

    async with transport.connect() as (read, write):
        running = asyncio.create_task(lowlevel.run(read, write, lowlevel.create_initialization_options()))
        async with serving(app, lifespan="off") as url:
            yield url
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_the_sdks_own_transport_resumes_and_ends(migrated_once: str) -> None:
    """With its own wiring alone, a resumed GET of the SDK never ends, and misses what comes while it replays."""
    async with running(migrated_once, 1) as (store,), own_transport(store, uuid4().hex) as url:
        session = await Session.initialize(url)
        response = await session.call("count", progress_token="t", id=7)
        seen = []
        async for event in response.events():
            seen.append(event)
            if len(seen) == 4:
                break
        response.cut()
        resumed = await session.get(seen[-1].id)
        assert resumed.status == 200
        await session.call_result("release")
        async with asyncio.timeout(10):
            rest = [event async for event in resumed.events() if event.data]
        assert resumed.complete
        messages = [event.message for event in seen if event.data] + [event.message for event in rest]
        assert [message["params"]["message"] for message in messages[:-1]] == [str(index) for index in range(6)]
        assert messages[-1]["id"] == 7 and "result" in messages[-1]


@pytest.mark.parametrize("version", ["2024-11-05", "2025-03-26", "2025-06-18", "2025-11-25"])
async def test_a_store_for_all_sessions_is_refused(
    version: str, migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = MCPServer("misused").streamable_http_app(event_store=PostgresStore(migrated_once))
    params = {"protocolVersion": version, "capabilities": {}, "clientInfo": {"name": "c", "version": "0"}}
    async with serving(app) as url, asyncio.timeout(5):
        response = await Session(url).request("initialize", params, id=0)
        assert response.status == 500
        assert "error" in json.loads(await response.read())
    assert "durable(" in caplog.text and "for_session(" in caplog.text, "the log does not say what to do"


async def test_the_refusal_names_the_way_to_do_it_right(migrated_once: str) -> None:
    async with PostgresStore(migrated_once) as store:
        for refused in (
            store.store_event("1", note(0)),
            store.store_event("1", None),
            store.replay_events_after("1-1", Received()),
        ):
            with pytest.raises(ConfigurationError, match=r"durable\(.*for_session\("):
                await refused
