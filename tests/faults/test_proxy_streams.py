"""However an upstream writes a stream, and wherever it breaks, the proxy's client gets what came, once, or an error."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from mcp_pg_events.proxy.upstream import Upstream
from tests.support.mcp_http import ConnectionCut, Response, Session, close_all
from tests.support.scripted_answers import cutting, event, going_on, note, result, sending, whole
from tests.support.scripted_proxy import LIMIT, LOST, PATIENCE, assert_free, messages, progress_of
from tests.support.scripted_upstream import SESSION, Answer, Exchange, ScriptedUpstream
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio

WAYS_OF_WRITING = {
    "lines end in CRLF": [b"event: message\r\ndata: " + note(1) + b"\r\n\r\n"],
    "lines end in CR": [b"event: message\rdata: " + note(1) + b"\r\r"],
    "data has several lines": [
        b'data: {"jsonrpc": "2.0",\ndata: "method": "m", "params":\ndata:  {"progress": 1}}\n\n'
    ],
    "an event comes in pieces": [b"da", b"ta: " + note(1)[:20], note(1)[20:] + b"\n", b"\n"],
    "a byte order mark comes first": [b"\xef\xbb\xbfdata: " + note(1) + b"\n\n"],
    "comments, hints and unknown fields": [b": hi\n\nretry: 50\n\nnonsense\nmore: nonsense\n\n" + event(note(1))],
    "an unknown event": [b"event: heartbeat\ndata: {}\n\n" + event(note(1))],
    "what is no JSON": [event(b"hello"), event(b"[1, 2]"), event(b""), event(note(1))],
    "half a surrogate pair": [
        event(b'{"jsonrpc": "2.0", "method": "m", "params": {"progress": 1, "message": "\\ud83d"}}')
    ],
    "many events that only say their id": [b"".join(b"id: %d\ndata:\n\n" % n for n in range(2000)), event(note(1))],
    "an id with NUL, and one that is too long": [event(note(1), "\0"), b"id: " + b"x" * 9000 + b"\ndata:\n\n"],
}


@pytest.mark.parametrize("pieces", WAYS_OF_WRITING.values(), ids=WAYS_OF_WRITING)
async def test_every_way_to_write_an_event_is_understood(
    pieces: list[bytes], session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [sending(*pieces)]
    assert (await progress_of(await session.call("x")))[0] == [1]


async def test_what_is_no_utf_8_becomes_the_replacement_character(session: Session, upstream: ScriptedUpstream) -> None:
    broken = b'{"jsonrpc":"2.0","method":"m","params":{"progress":"\xff\xfe"}}'
    upstream.on_call = [sending(event(broken))]
    assert (await progress_of(await session.call("x")))[0] == ["��"]


async def test_an_answer_whose_id_has_another_type_ends_the_call(session: Session, upstream: ScriptedUpstream) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.stream()
        await exchange.send(event(result(exchange, id=str(exchange.id))))
        await exchange.send(event(note(9)) * 3)

    upstream.on_call = [answer]
    assert len(await messages(await session.call("x", id=77))) == 1
    await assert_free(session, upstream, 77)


async def test_what_comes_after_the_answer_is_dropped(session: Session, upstream: ScriptedUpstream) -> None:
    gone = asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        await exchange.stream()
        await exchange.send(event(result(exchange)))
        try:
            while True:
                await exchange.send(event(note(9)))
                await asyncio.sleep(0.01)
        except ConnectionError:
            gone.set()

    upstream.on_call = [answer]
    assert len(await messages(await session.call("x"))) == 1
    await asyncio.wait_for(gone.wait(), 5)


async def test_an_event_that_is_too_large_ends_its_call(session: Session, upstream: ScriptedUpstream) -> None:
    upstream.on_call = [sending(event(note(1)), b"data: " + b"x" * (LIMIT + 1))]
    numbers, final = await progress_of(await session.call("x"))
    assert (numbers, final["error"]["data"]) == ([1], LOST)


# --- connections that break -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", ["of its events", "before its first event"])
async def test_a_stream_that_is_cut_goes_on_after_what_was_stored(
    ids: str, session: Session, upstream: ScriptedUpstream
) -> None:
    begun = [event(note(1), "a"), event(note(2), "b")] if ids == "of its events" else [b"id: b\ndata:\n\n"]
    upstream.on_call = [cutting(*begun, event(note(3), "c")[:30])]
    upstream.on_get = [
        cutting(event(note(3), "c"), event(note(4), "d")[:-1]),
        going_on(upstream.requests, event(note(4), "d"), event(note(5), "e")),
    ]
    numbers, final = await progress_of(await session.call("x"))
    assert numbers == ([1, 2] if ids == "of its events" else []) + [3, 4, 5]
    assert "result" in final
    resumed = [exchange for exchange in upstream.requests if exchange.method == "GET"]
    assert [exchange.header("last-event-id") for exchange in resumed] == ["b", "c"]
    assert {exchange.header("mcp-session-id") for exchange in upstream.requests} == {SESSION}


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [event(note(1))],
        [event(note(1), "a"), event(note(2))],
        [event(note(1), "a"), b"id\n" + event(note(2))],
        [b"id: \xff\n" + event(note(1))],
    ],
    ids=["at once", "without an id", "after an event without one", "after an empty id", "after an id that is no text"],
)
@pytest.mark.parametrize("end", ["cut", "ended"])
async def test_a_stream_that_cannot_be_resumed_ends_with_an_error(
    pieces: list[bytes], end: str, session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [cutting(*pieces) if end == "cut" else sending(*pieces, final=False)]
    numbers, final = await progress_of(await session.call("x", id="lost"))
    assert numbers == list(range(1, len(pieces) + 1))
    assert final["error"]["data"] == LOST
    assert upstream.on_get == []
    await assert_free(session, upstream, "lost")


async def test_a_response_that_the_upstream_ends_to_be_asked_again_ends_with_the_same_hint(
    session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [sending(b"retry: 70\n" + event(note(1), "a"), final=False)]
    upstream.on_get = [going_on(upstream.requests, event(note(2), "b"))]
    response = await session.call("x")
    events = [each async for each in response.events()]
    assert response.complete
    assert events[-1].retry == 70 and events[-1].data == ""
    again = await session.get(events[-1].id)
    seen = [each.message async for each in again.events() if each.data]
    got = [each.message for each in events if each.data] + seen
    assert [each["params"]["progress"] for each in got[:-1]] == [1, 2]
    assert "result" in got[-1]


@pytest.mark.parametrize("status", ["500 Oops", "502 Bad Gateway", "503 Busy", "429 Slowly", "409 Conflict"])
async def test_an_upstream_that_is_busy_is_asked_again(
    status: str, session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [cutting(event(note(1), "a"))]
    upstream.on_get = [whole(status), whole(status), going_on(upstream.requests, event(note(2), "b"))]
    numbers, final = await progress_of(await session.call("x"))
    assert numbers == [1, 2] and "result" in final


async def test_an_upstream_that_stays_busy_is_given_up(session: Session, upstream: ScriptedUpstream) -> None:
    upstream.on_call = [cutting(event(note(1), "a"))]
    upstream.on_get = [whole("503 Busy")] * 100
    began = time.monotonic()
    assert (await progress_of(await session.call("x")))[1]["error"]["data"] == LOST
    assert time.monotonic() - began < PATIENCE + 3


@pytest.mark.parametrize(
    "answer",
    [whole("405 Method Not Allowed"), whole("400 Bad Request"), whole("307 Elsewhere", location="http://127.0.0.1:1/")],
    ids=["405", "400", "redirect"],
)
async def test_an_upstream_that_cannot_resume_says_so_at_once(
    answer: Answer, session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [cutting(event(note(1), "a"))]
    upstream.on_get = [answer]
    assert (await progress_of(await session.call("x")))[1]["error"]["data"] == LOST


async def test_an_upstream_that_resumes_with_nothing_is_given_up(session: Session, upstream: ScriptedUpstream) -> None:
    upstream.on_call = [cutting(b"retry: 20\n" + event(note(1), "a"))]
    upstream.on_get = [sending(final=False)] * 100
    assert (await progress_of(await session.call("x")))[1]["error"]["data"] == LOST
    assert len(upstream.requests) < 10


async def test_a_host_that_goes_without_a_word_is_noticed(upstream: ScriptedUpstream) -> None:
    """The kernel asks it; a host that is really gone is more than one machine can show."""
    upstream.on_call = [sending()]
    async with Upstream(upstream.url, verify=True, ca_file=None, timeout=5, max_message_size=LIMIT) as asked:
        reply = await asked.request("POST", {}, body=b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call"}')
        connection = reply._response.connection
        assert connection is not None and connection.transport is not None
        made = connection.transport.get_extra_info("socket")
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle, interval, count = (
            made.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle + interval * count == 30
        reply.close()


# --- requests without a session ---------------------------------------------------------------------------------------


async def stateless(replica_once: Workers, request_id: int = 1) -> Response:
    session = Session(replica_once[0].url, headers={"MCP-Protocol-Version": "2026-07-28"})
    return await session.call("x", id=request_id)


async def test_a_client_that_hangs_up_ends_its_request_at_the_upstream(
    replica_once: Workers, upstream: ScriptedUpstream
) -> None:
    """Also before the upstream has answered with anything."""
    asked, gone = asyncio.Event(), asyncio.Event()

    async def answer(exchange: Exchange) -> None:
        asked.set()
        await exchange.hung_up()
        gone.set()

    upstream.on_call = [answer]
    calling = asyncio.create_task(stateless(replica_once))
    await asyncio.wait_for(asked.wait(), 5)
    close_all()
    # Less than PATIENCE, after which the proxy itself gives up.
    await asyncio.wait_for(gone.wait(), PATIENCE / 2)
    with pytest.raises(ConnectionCut):
        await calling


async def test_a_response_without_a_session_is_cut_where_the_upstreams_is(
    replica_once: Workers, upstream: ScriptedUpstream
) -> None:
    replica_once.forget()
    upstream.on_call = [cutting(event(note(1))), sending(event(note(2)))]
    with pytest.raises(ConnectionCut):
        await (await stateless(replica_once)).messages()
    assert "Traceback" not in replica_once[0].output()
    assert len(await (await stateless(replica_once)).messages()) == 2
