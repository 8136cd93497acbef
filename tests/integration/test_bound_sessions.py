"""Sessions that live on one worker: their requests travel there, in order, once, and end with it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from uuid import uuid4

import pytest
from mcp_types import JSONRPCRequest, JSONRPCResponse
from starlette.requests import Request

from mcp_pg_events import PostgresStore
from mcp_pg_events.backend import App, CursorRejected, RequestInFlight, SessionKey, SessionUnknown, Stream
from mcp_pg_events.errors import AppendRefused, DatabaseUnavailable
from mcp_pg_events.proxy.process import Command
from mcp_pg_events.proxy.stdio_sessions import ProcessSessions
from tests.support.log import NOTE, RESULT, VERSION, assert_streams_are_whole, parts, query, running, stored, until

pytestmark = pytest.mark.anyio


class Owner:
    """The app of the worker that a session lives on: what came for it, and the streams of its requests."""

    def __init__(self, store: PostgresStore) -> None:
        self.letters: list[str] = []
        self.streams: list[Stream] = []
        self.ended: list[str] = []
        self.takes = True
        store.register(App(self._receive, self.ended.append, lambda session_id: None, lambda: None))

    def _receive(self, session_id: str, payload: str, stream: Stream | None) -> bool:
        if not self.takes:
            return False
        self.letters.append(payload)
        if stream is not None:
            self.streams.append(stream)
        return True


async def open_bound(store: PostgresStore) -> SessionKey:
    key = SessionKey(uuid4().hex, "server", None, None)
    opened = await store.log.open_session(
        key, initialize="{}", protocol_version=VERSION, request_id="0", request_key="i0", limit=None, bound=True
    )
    await store.log.append(opened.stream, RESULT, final=True)
    return key


def request(number: int) -> tuple[JSONRPCRequest, bytes]:
    message = JSONRPCRequest(jsonrpc="2.0", id=number, method="tools/call")
    return message, message.model_dump_json().encode()


def finals(dsn: str, stream: int) -> list[str]:
    """The reasons of the errors in a stream."""
    messages = [json.loads(payload) for _, payload in stored(dsn, stream)]
    return [message["error"]["data"]["reason"] for message in messages if "error" in message]


async def test_a_request_travels_with_its_stream_and_its_owner_appends(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (here, there):
        owner = Owner(here)
        key = await open_bound(here)
        message, body = request(1)
        call = await there.bound.open_stream(key, message, body)
        assert call.elsewhere
        await until(lambda: owner.streams)
        assert owner.letters == [body.decode()]
        assert owner.streams[0].number == call.stream.number
        subscription = there.hub.subscribe(call.stream.number, key.session_id, 1)
        await here.log.append(owner.streams[0], NOTE)
        await here.log.append(owner.streams[0], RESULT, final=True)
        async with asyncio.timeout(3):
            await subscription.wait(5)
        assert stored(migrated_once, call.stream.number) == [(1, NOTE), (2, RESULT)]
        there.hub.unsubscribe(subscription)


async def test_on_its_own_worker_a_request_stays_and_waits_for_older_letters(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (here, there):
        owner = Owner(here)
        key = await open_bound(here)
        call = await here.bound.open_stream(key, request(1)[0], None)
        assert not call.elsewhere and not call.letters
        parts(here).inbox.check = lambda: None  # type: ignore[method-assign]  # nobody tells it
        await there.bound.post(await there.bound.owner(key), key.session_id, b"{}")
        later = await here.bound.open_stream(key, request(2)[0], None)
        assert later.letters
        assert owner.letters == []
        await here.bound.collect()
        assert owner.letters == ["{}"]
        assert not (await here.bound.open_stream(key, request(3)[0], None)).letters
        await there.bound.post(here.worker_number(), key.session_id, b"{1}")
        assert await here.bound.owner(key) == here.worker_number()
        assert owner.letters == ["{}", "{1}"]


async def test_an_id_in_flight_is_refused_wherever_it_was_opened(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (here, there):
        Owner(here)
        key = await open_bound(here)
        call = await there.bound.open_stream(key, *request(1))
        there.hub.subscribe(call.stream.number, key.session_id, 1)
        for store in (here, there):
            with pytest.raises(RequestInFlight):
                await store.bound.open_stream(key, *request(1))


async def test_a_request_whose_statement_ran_twice_is_opened_once(migrated_once: str) -> None:
    """The connection broke before the answer came: nothing reads the stream yet, and it is the asker's own."""
    async with running(migrated_once, 2) as (here, there):
        owner = Owner(here)
        key = await open_bound(here)
        first = await there.bound.open_stream(key, *request(1))
        again = await there.bound.open_stream(key, *request(1))
        assert again.stream.number == first.stream.number
        await until(lambda: owner.letters)
        await here.bound.collect()
        assert len(owner.letters) == 1


async def test_a_request_that_its_sessions_end_overtook_is_not_run(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (here, there):
        owner = Owner(here)
        key = await open_bound(here)
        # Its letter is stored, and not collected yet.
        lock = parts(here).inbox._collecting
        async with lock:
            call = await there.bound.open_stream(key, *request(1))
            await there.log.end_session(key, "deleted")
        await here.bound.collect()
        assert owner.letters == []
        assert finals(migrated_once, call.stream.number) == ["session_ended"]


async def test_a_stream_that_ended_while_its_letter_was_read_is_noticed(migrated_once: str) -> None:
    """The letter said that the stream was open; the end came before its owner had taken it on."""
    async with running(migrated_once, 2) as (here, there):
        owner = Owner(here)
        key = await open_bound(here)
        deliver = parts(here).inbox._deliver
        told = asyncio.Event()
        # The first call of the owner's takes part in the epoch that the end raises.
        own = await here.bound.open_stream(key, request(1)[0], None)

        def late(session_id: str, payload: str, carried: object) -> None:
            parts(here).spawn(later(session_id, payload, carried))

        async def later(session_id: str, payload: str, carried: object) -> None:
            await there.log.end_session(key, "deleted")
            with pytest.raises(AppendRefused):
                await here.log.append(own.stream, NOTE)
            deliver(session_id, payload, carried)  # type: ignore[arg-type]
            told.set()

        parts(here).inbox._deliver = late  # type: ignore[assignment]
        call = await there.bound.open_stream(key, *request(2))
        async with asyncio.timeout(10):
            await told.wait()
            while not owner.streams[0].ended:  # noqa: ASYNC110 (nobody tells)
                await asyncio.sleep(0.01)
        assert finals(migrated_once, call.stream.number) == ["session_ended"]


async def test_a_request_that_nobody_takes_ends_with_an_error(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (here, there):
        Owner(here).takes = False
        key = await open_bound(here)
        call = await there.bound.open_stream(key, *request(1))
        await until(lambda: finals(migrated_once, call.stream.number))
        assert finals(migrated_once, call.stream.number) == ["session_ended"]
        assert not parts(here).writer.calls.owns(call.stream.number)


async def test_a_dead_workers_sessions_end_with_it_and_say_so_to_who_comes_back(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (here, there):
        Owner(here)
        key, other = await open_bound(here), await open_bound(there)
        call = await there.bound.open_stream(key, *request(1))
        standalone = (await there.log.attach(key, None, None, patience=1)).stream
        await parts(there).finisher.end_worker(here.worker_number(), "worker_lost")
        assert finals(migrated_once, call.stream.number) == ["worker_lost"]
        rows = query(migrated_once, "SELECT ended_reason FROM sessions WHERE id = %s", key.session_id)
        assert rows == [("worker_lost",)]
        with pytest.raises(SessionUnknown):
            await there.bound.open_stream(key, *request(2))
        with pytest.raises(SessionUnknown):
            await there.bound.owner(key)
        with pytest.raises(SessionUnknown):
            await there.bound.post(here.worker_number(), key.session_id, b"{}")
        # Its standalone stream is over with it; of its calls it is told for a while.
        with pytest.raises(SessionUnknown):
            await there.log.attach(key, None, None, patience=1)
        assert query(migrated_once, "SELECT final_seq FROM streams WHERE number = %s", standalone) == [(0,)]
        assert not (await there.log.attach(key, call.stream.number, 0, patience=1)).complete
        with pytest.raises(CursorRejected):
            await there.log.attach(key, call.stream.number, 7, patience=1)
        assert (await there.bound.open_stream(other, *request(1))).elsewhere is False
        query(migrated_once, "UPDATE sessions SET ended_at = now() - interval '2 min' WHERE id = %s", key.session_id)
        with pytest.raises(SessionUnknown):
            await there.log.attach(key, call.stream.number, 0, patience=1)


async def test_a_session_whose_dead_worker_took_it_not_along_is_unknown(migrated_once: str) -> None:
    """An older worker, which knows nothing of such sessions, declared that one dead."""
    async with running(migrated_once, 2) as (here, there):
        key = await open_bound(here)
        query(
            migrated_once,
            "UPDATE workers SET ended_at = now(), epoch = epoch + 1 WHERE number = %s",
            here.worker_number(),
        )
        with pytest.raises(SessionUnknown):
            await there.bound.open_stream(key, *request(1))
        with pytest.raises(SessionUnknown):
            await there.bound.owner(key)


async def test_requests_that_race_with_the_end_of_their_worker_all_have_their_end(migrated_once: str) -> None:
    async with running(migrated_once, 2) as (here, there):
        Owner(here)
        sessions = [await open_bound(here) for _ in range(5)]
        number = here.worker_number()

        async def ask(index: int) -> int | None:
            await asyncio.sleep(index * 0.002)
            try:
                call = await there.bound.open_stream(sessions[index % 5], *request(index + 1))
            except (SessionUnknown, DatabaseUnavailable):
                return None
            return call.stream.number

        async def end() -> None:
            await asyncio.sleep(0.03)
            await parts(there).finisher.end_worker(number, "worker_lost")

        *numbers, _ = await asyncio.gather(*(ask(index) for index in range(40)), end())
        opened = [number for number in numbers if number is not None]
        assert opened and len(opened) < 40
        for stream in opened:
            await until(lambda stream=stream: finals(migrated_once, stream))  # type: ignore[misc]
            assert finals(migrated_once, stream) == ["worker_lost"]
        assert_streams_are_whole(migrated_once)
        assert query(migrated_once, "SELECT count(*) FROM inbox WHERE worker = %s", number) == [(0,)]


async def test_a_program_reads_what_travelled_before_what_landed_later(migrated_once: str, tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).parents[1] / "servers" / "stdio_program.py")]
    command = Command.checked(program, extra={"TEST_DIRECTORY": str(tmp_path)}, max_message_size=2**20, stop_timeout=1)
    async with running(migrated_once, 2) as (here, there):
        sessions = ProcessSessions(command, here, name="server", max_processes=1, idle_timeout=None, start_timeout=10)
        async with sessions.running():
            key = SessionKey(uuid4().hex, "server", None, None)
            session = sessions.open(key)
            opening = json.dumps(
                {"jsonrpc": "2.0", "id": 0, "method": "initialize", "params": {"protocolVersion": "1"}}
            )
            message = JSONRPCRequest.model_validate_json(opening)
            [answer] = await session.initialize(message, opening.encode(), Request({"type": "http"}))
            assert isinstance(answer, JSONRPCResponse)
            opened = await here.log.open_session(
                key, initialize="{}", protocol_version=VERSION, request_id="0", request_key="i0", limit=None, bound=True
            )
            session.standalone = Stream(opened.standalone, key.session_id, shared=True)
            parts(here).inbox.check = lambda: None  # type: ignore[method-assign]  # nobody tells it
            await there.bound.post(here.worker_number(), key.session_id, b'{"jsonrpc":"2.0","method":"travelled"}')
            asking = JSONRPCRequest(jsonrpc="2.0", id=1, method="tools/call", params={"name": "received"})
            body = asking.model_dump_json().encode()
            call = await sessions.open_stream(key, asking, body)
            await sessions.start(key, call, asking, body, Request({"type": "http"}))
            await until(lambda: stored(migrated_once, call.stream.number))
            [(_, payload)] = stored(migrated_once, call.stream.number)
            assert json.loads(json.loads(payload)["result"]["content"][0]["text"]) == ["initialize", "travelled"]
