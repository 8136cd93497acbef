"""Whatever an upstream does, the proxy's client has a clear outcome: what came, once, or an error that says why."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from mcp_pg_events.proxy.upstream import Upstream
from tests.support.log import query
from tests.support.mcp_http import ConnectionCut, Response, Session, close_all
from tests.support.scripted_upstream import SESSION, Exchange, ScriptedUpstream
from tests.support.until import until
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio

LIMIT = 1_000_000
PATIENCE = 1.5
OPTIONS = {"proxy": {"patience": PATIENCE, "upstream_timeout": PATIENCE, "max_message_size": LIMIT}}


@pytest.fixture(scope="module")
async def scripted_once(anyio_backend: str) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream.running() as upstream:
        yield upstream


@pytest.fixture(scope="module")
async def replica_once(scripted_once: ScriptedUpstream, migrated_once: str) -> AsyncIterator[Workers]:
    environment = {"TEST_UPSTREAM": scripted_once.url}
    async with run_workers("proxied_app", migrated_once, 1, environment=environment, options=OPTIONS) as workers:
        yield workers


@pytest.fixture
async def upstream(scripted_once: ScriptedUpstream) -> AsyncIterator[ScriptedUpstream]:
    yield scripted_once
    scripted_once.forget()


@pytest.fixture
async def session(replica_once: Workers, upstream: ScriptedUpstream) -> AsyncIterator[Session]:
    replica_once.forget()
    yield await Session.initialize(replica_once[0].url)
    close_all()
    output = replica_once[0].output()
    assert "Traceback" not in output and "ERROR" not in output, output


# --- what the upstream sends ------------------------------------------------------------------------------------------


def note(number: int) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": number}}).encode()


def result(exchange: Exchange, **more: Any) -> bytes:
    message = {"jsonrpc": "2.0", "id": exchange.id, "result": {"content": []}, **more}
    return json.dumps(message).encode()


def event(data: bytes, event_id: str | None = None) -> bytes:
    return (b"" if event_id is None else f"id: {event_id}\n".encode()) + b"event: message\ndata: " + data + b"\n\n"


def sending(*pieces: bytes, final: bool = True) -> Any:
    """A stream of these bytes and then, if it is `final`, the answer."""

    async def answer(exchange: Exchange) -> None:
        await exchange.stream()
        for piece in pieces:
            await exchange.send(piece)
        if final:
            await exchange.send(event(result(exchange)))
        exchange.writer.close()

    return answer


def whole(status: str, body: bytes = b"", **headers: str) -> Any:
    async def answer(exchange: Exchange) -> None:
        await exchange.whole(status, body, **headers)

    return answer


def cutting(*pieces: bytes) -> Any:
    """A stream that is cut in the middle of something."""

    async def answer(exchange: Exchange) -> None:
        await exchange.chunked()
        for piece in pieces:
            await exchange.chunk(piece)
        await asyncio.sleep(0.05)  # what was sent is to arrive before the reset, which drops it otherwise
        exchange.cut()

    return answer


def going_on(call: list[Exchange], *pieces: bytes) -> Any:
    """A resumed stream, which ends with the answer to the call that was made first."""

    async def answer(exchange: Exchange) -> None:
        await exchange.stream()
        for piece in pieces:
            await exchange.send(piece)
        await exchange.send(event(result(call[0]), "last"))
        exchange.writer.close()

    return answer


# --- what its client gets ---------------------------------------------------------------------------------------------


async def messages(response: Response) -> list[Any]:
    assert response.status == 200, (response.status, await response.read())
    async with asyncio.timeout(15):
        return await response.messages()


async def progress_of(response: Response) -> tuple[list[int], Any]:
    """The numbers of the notes that came, and the answer."""
    *notes, final = await messages(response)
    return [each["params"]["progress"] for each in notes], final


async def assert_free(session: Session, upstream: ScriptedUpstream, request_id: Any) -> None:
    """The id of a call that is over may be used again."""
    upstream.on_call = [sending()]
    assert "result" in (await messages(await session.call("echo", id=request_id)))[-1]


LOST = {"reason": "upstream_lost"}

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
    answer: Any, session: Session, upstream: ScriptedUpstream
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


# --- answers that are no streams --------------------------------------------------------------------------------------


async def test_a_json_answer_passes(session: Session, upstream: ScriptedUpstream) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.whole("200 OK", result(exchange), content_type="application/json", x_more="more")

    upstream.on_call = [answer, sending()]
    response = await session.call("x", id=5)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-more"] == "more"
    assert response.headers["mcp-session-id"] == session.session_id
    assert (await response.json())["id"] == 5
    await assert_free(session, upstream, 5)


PASSED_ON = {
    "500": (whole("500 Oops", b"oops", content_type="text/plain"), 500, b"oops"),
    "401": (whole("401 Unauthorized", b"", www_authenticate='Bearer resource_metadata="x"'), 401, b""),
    "202 to a request": (whole("202 Accepted"), 202, b""),
    "an empty body": (whole("200 OK", b"", content_type="application/json"), 200, b""),
    "what no JSON contains": (whole("200 OK", b'"\0"', content_type="application/json"), 200, b'"\0"'),
    "a page": (whole("200 OK", b"<p>", content_type="text/html"), 200, b"<p>"),
}


@pytest.mark.parametrize(("answer", "status", "body"), PASSED_ON.values(), ids=PASSED_ON)
async def test_what_is_no_stream_passes_as_it_is_and_frees_the_id(
    answer: Any, status: int, body: bytes, session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [answer]
    response = await session.call("x", id="again")
    assert (response.status, await response.read()) == (status, body)
    if status == 401:
        assert response.headers["www-authenticate"].startswith("Bearer")
    await assert_free(session, upstream, "again")


async def test_a_compressed_answer_passes_compressed(session: Session, upstream: ScriptedUpstream) -> None:
    async def answer(exchange: Exchange) -> None:
        assert exchange.header("accept-encoding") == "identity"
        packed = gzip.compress(result(exchange))
        await exchange.whole("200 OK", packed, content_type="application/json", content_encoding="gzip")

    upstream.on_call = [answer]
    response = await session.call("x", id="packed")
    assert response.headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(await response.read()))["id"] == "packed"
    await assert_free(session, upstream, "packed")


async def garbage(exchange: Exchange) -> None:
    await exchange.send(b"this is not HTTP\r\n\r\n")
    exchange.writer.close()


async def hangs_up(exchange: Exchange) -> None:
    exchange.writer.close()


async def is_slow(exchange: Exchange) -> None:
    await asyncio.sleep(PATIENCE + 5)


async def large_headers(exchange: Exchange) -> None:
    await exchange.whole("200 OK", b"{}", content_type="application/json", x_large="x" * 100_000)


async def cut_json(exchange: Exchange) -> None:
    await exchange.head(content_type="application/json", content_length="1000")
    await exchange.send(b'{"jsonrpc":')
    exchange.writer.close()


REFUSED = {
    "a redirect": (whole("307 Elsewhere", location="http://127.0.0.1:1/"), 502, "redirects"),
    "garbage": (garbage, 502, "gave no answer"),
    "nothing": (hangs_up, 502, "gave no answer"),
    "headers that take too long": (is_slow, 504, "gave no answer within 1.5 seconds"),
    "headers that are too large": (large_headers, 502, "gave no answer"),
    "a body that is cut": (cut_json, 502, "was cut"),
    "a body that is too large": (whole("200 OK", b"x" * (LIMIT + 1), content_type="application/json"), 502, "larger"),
}


@pytest.mark.parametrize(("answer", "status", "text"), REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_passed_on_is_said_in_one_sentence_and_frees_the_id(
    answer: Any, status: int, text: str, session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [answer]
    response = await session.call("x", id="again")
    error = (await response.json())["error"]
    assert (response.status, error["data"]) == (status, LOST)
    assert text in error["message"]
    await assert_free(session, upstream, "again")


async def test_an_event_that_is_too_large_ends_its_call(session: Session, upstream: ScriptedUpstream) -> None:
    upstream.on_call = [sending(event(note(1)), b"data: " + b"x" * (LIMIT + 1))]
    numbers, final = await progress_of(await session.call("x"))
    assert (numbers, final["error"]["data"]) == ([1], LOST)


async def test_a_request_that_is_too_large_is_refused(session: Session, upstream: ScriptedUpstream) -> None:
    assert (await session.call("x", {"a": "x" * LIMIT})).status == 413
    assert upstream.requests == []


# --- its sessions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("found_by", ["a request", "a resumed stream"])
async def test_a_session_that_the_upstream_has_lost_ends_for_its_client_too(
    found_by: str, session: Session, upstream: ScriptedUpstream
) -> None:
    if found_by == "a request":
        waiting = asyncio.Event()

        async def wait(exchange: Exchange) -> None:
            await exchange.chunked()
            await exchange.chunk(event(note(1), "a"))
            await waiting.wait()

        upstream.on_call = [wait, whole("404 Not Found")]
        open_call = await session.call("x")
        assert (await session.call("y")).status == 404
        assert (await progress_of(open_call))[1]["error"]["data"] == {"reason": "session_ended"}
        waiting.set()
    else:
        upstream.on_call = [cutting(event(note(1), "a"))]
        upstream.on_get = [whole("404 Not Found")]
        assert (await progress_of(await session.call("x")))[1]["error"]["data"] == {"reason": "session_ended"}
    assert (await session.call("z")).status == 404
    again = await Session.initialize(session.base_url)
    upstream.on_call = [sending()]
    assert "result" in (await messages(await again.call("x")))[-1]


async def test_a_session_that_cannot_be_recorded_does_not_stay_open_at_the_upstream(
    replica_once: Workers, upstream: ScriptedUpstream, migrated_once: str
) -> None:
    replica_once.forget()
    query(migrated_once, "ALTER TABLE sessions ADD CONSTRAINT refusing CHECK (upstream IS NULL) NOT VALID")
    try:
        with pytest.raises(AssertionError, match="500"):
            await Session.initialize(replica_once[0].url)
    finally:
        query(migrated_once, "ALTER TABLE sessions DROP CONSTRAINT refusing")

    async def deleted() -> bool:
        return [(each.method, each.header("mcp-session-id")) for each in upstream.requests] == [("DELETE", SESSION)]

    await until(deleted)
    assert "Traceback" not in replica_once[0].output()
    await Session.initialize(replica_once[0].url)


async def test_a_delete_that_the_upstream_does_not_allow_leaves_the_session(
    session: Session, upstream: ScriptedUpstream
) -> None:
    async def refuse(exchange: Exchange) -> bool:
        if exchange.method != "DELETE":
            return False
        await exchange.whole("405 Method Not Allowed")
        return True

    upstream.on_other = refuse
    assert (await session.delete()).status == 405
    await assert_free(session, upstream, 1)


async def test_the_standalone_stream_is_refused_as_the_upstream_refuses_it(
    session: Session, upstream: ScriptedUpstream
) -> None:
    assert (await session.get()).status == 405
    assert len(upstream.requests) == 1


async def test_the_standalone_stream_is_led_nowhere_else(session: Session, upstream: ScriptedUpstream) -> None:
    upstream.on_get = [whole("307 Elsewhere", location="http://127.0.0.1:1/")]
    response = await session.get()
    assert response.status == 502 and "location" not in response.headers
    assert "redirects" in (await response.json())["error"]["message"]


async def test_the_handshake_may_come_as_a_stream_under_an_id_of_another_type(
    session: Session, upstream: ScriptedUpstream
) -> None:
    async def streams(exchange: Exchange) -> bool:
        if exchange.method != "POST" or exchange.message.get("method") != "initialize":
            return False
        shaken = {"protocolVersion": "2025-11-25", "capabilities": {}, "serverInfo": {"name": "s", "version": "0"}}
        await exchange.head(content_type="text/event-stream", connection="close", mcp_session_id=SESSION)
        await exchange.send(event(result(exchange, id=str(exchange.id), result=shaken)))
        return True

    upstream.on_other = streams
    other = await Session.initialize(session.base_url)
    await assert_free(other, upstream, 1)


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


# --- headers ----------------------------------------------------------------------------------------------------------


async def test_headers_pass_but_for_those_of_one_connection(session: Session, upstream: ScriptedUpstream) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.whole(
            "200 OK",
            result(exchange),
            content_type="application/json",
            set_cookie="a=1; Path=/",
            connection="keep-alive, x-hop",
            keep_alive="timeout=5",
            x_hop="no",
        )

    upstream.on_call = [answer]
    session.path = "/mcp?key=a%20b&x=%2F"
    session.extra_headers = {
        "Authorization": "Bearer t",
        "Cookie": "c=d",
        "X-Api-Key": "k",
        "Connection": "keep-alive, x-mine",
        "X-Mine": "no",
        "TE": "trailers",
        "X-Forwarded-For": "10.0.0.9",
        "User-Agent": "a client",
    }
    response = await session.call("x")
    assert response.status == 200
    assert response.headers["set-cookie"] == "a=1; Path=/"
    assert "keep-alive" not in response.headers and "x-hop" not in response.headers
    [exchange] = upstream.requests
    assert exchange.target == "/mcp?key=a%20b&x=%2F"
    assert exchange.header("host") == upstream.url.split("/")[2]
    assert exchange.header("authorization") == "Bearer t"
    assert exchange.header("cookie") == "c=d"
    assert exchange.header("x-api-key") == "k"
    assert exchange.header("user-agent") == "a client"
    assert exchange.header("x-forwarded-for") == "10.0.0.9"
    assert exchange.header("x-forwarded-proto") == "http"
    assert exchange.header("x-forwarded-host") == session.base_url.removeprefix("http://")
    assert exchange.header("x-mine") is None and exchange.header("te") is None
