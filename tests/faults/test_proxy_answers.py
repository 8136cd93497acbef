"""Answers that are no streams pass the proxy with their headers, or an error says in a sentence why they cannot."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from tests.support.mcp_http import Session
from tests.support.scripted_answers import result, sending, whole
from tests.support.scripted_proxy import LIMIT, LOST, PATIENCE, assert_free
from tests.support.scripted_upstream import Answer, Exchange, ScriptedUpstream

pytestmark = pytest.mark.anyio


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
    answer: Answer, status: int, body: bytes, session: Session, upstream: ScriptedUpstream
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
    answer: Answer, status: int, text: str, session: Session, upstream: ScriptedUpstream
) -> None:
    upstream.on_call = [answer]
    response = await session.call("x", id="again")
    error = (await response.json())["error"]
    assert (response.status, error["data"]) == (status, LOST)
    assert text in error["message"]
    await assert_free(session, upstream, "again")


async def test_a_request_that_is_too_large_is_refused(session: Session, upstream: ScriptedUpstream) -> None:
    assert (await session.call("x", {"a": "x" * LIMIT})).status == 413
    assert upstream.requests == []


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
