"""One stream of the upstream, with a log and an upstream that do what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from mcp_pg_events.backend import SessionKey, Stream
from mcp_pg_events.proxy import relay as relaying
from mcp_pg_events.proxy.relay import Asker, Relay
from mcp_pg_events.relayed import RelayedSession

pytestmark = pytest.mark.anyio

KEY = SessionKey("session", "server", None, None)
RESULT = b'id: last\ndata: {"jsonrpc": "2.0", "id": 1, "result": {}}\n\n'


class FakeReply:
    """A stream of pieces; None is silence until it is closed."""

    is_stream, is_encoded, status = True, False, 200

    def __init__(self, *pieces: bytes | None) -> None:
        self._pieces = pieces
        self.closed = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            if piece is None:
                await self.closed.wait()
                return
            yield piece

    async def finish(self) -> None:
        self.close()

    def close(self) -> None:
        self.closed.set()


class FakeUpstream:
    def __init__(self, *replies: FakeReply) -> None:
        self.replies = list(replies)
        self.asked: list[str | None] = []
        self.was_asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.answers.set()

    async def request(self, method: str, headers: Any, *, extra: list[tuple[str, str]], **more: Any) -> FakeReply:
        self.asked.append(dict(extra).get("last-event-id"))
        self.was_asked.set()
        await self.answers.wait()
        return self.replies.pop(0)


class FakeStore:
    """A log that takes events while it has room."""

    def __init__(self) -> None:
        self.log = self.relayed = self
        self.room = asyncio.Event()
        self.room.set()
        self.stored: list[bytes | None] = []

    async def enqueue(
        self, stream: Stream, payload: bytes, *, final: bool, upstream_id: bytes | None
    ) -> asyncio.Future[int]:
        await self.room.wait()
        self.stored.append(upstream_id)
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        done.set_result(len(self.stored))
        return done

    async def note_id(self, stream: Stream, upstream_id: bytes) -> None:
        pass


def resumed(store: FakeStore, upstream: FakeUpstream) -> Relay:
    stream = Stream(1, KEY.session_id, None)
    session = RelayedSession("u", "2025-03-26", 2)
    asker = Asker({}, b"")
    given = cast(Any, store), cast(Any, upstream)
    return Relay(*given, KEY, session, stream, 1, asker, limit=10_000, patience=1.0, last_id=b"a", fresh=False)


async def test_a_log_that_has_no_room_is_no_silence_of_the_upstream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "SILENCE", 0.05)
    store, upstream = FakeStore(), FakeUpstream(FakeReply(b'id: b\ndata: {"method": "m"}\n\n', RESULT))
    store.room.clear()
    asyncio.get_running_loop().call_later(0.2, store.room.set)
    await asyncio.wait_for(resumed(store, upstream).run(None), 5)
    assert (store.stored, upstream.asked) == ([b"b", b"last"], ["a"])


async def test_a_resumed_stream_that_is_silent_is_resumed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relaying, "SILENCE", 0.05)
    monkeypatch.setattr(relaying, "RETRY", 0.01)
    silent = FakeReply(b'id: b\ndata: {"method": "m"}\n\n', None)
    store, upstream = FakeStore(), FakeUpstream(silent, FakeReply(RESULT))
    await asyncio.wait_for(resumed(store, upstream).run(None), 5)
    assert (store.stored, upstream.asked) == ([b"b", b"last"], ["a", "b"])
    assert silent.closed.is_set()


async def test_a_relay_that_was_left_while_it_asked_reads_nothing() -> None:
    reply = FakeReply(None)
    store, upstream = FakeStore(), FakeUpstream(reply)
    upstream.answers.clear()
    relay = resumed(store, upstream)
    running = asyncio.create_task(relay.run(None))
    await upstream.was_asked.wait()
    await relay.settle()
    upstream.answers.set()
    await asyncio.wait_for(running, 5)
    assert reply.closed.is_set() and store.stored == []


async def test_a_relay_that_was_left_while_it_waited_is_gone_at_once() -> None:
    reply = FakeReply(b"retry: 60000\n\n")
    store, upstream = FakeStore(), FakeUpstream(reply)
    relay = resumed(store, upstream)
    running = asyncio.create_task(relay.run(None))
    # Closed at its end, and the next is not asked for before a minute has passed.
    await reply.closed.wait()
    relay.hang_up()
    await asyncio.wait_for(running, 5)
    assert len(upstream.asked) == 1
