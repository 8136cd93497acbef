"""A session of the proxy and that of its upstream begin and end together, and the upstream's refusals pass."""

from __future__ import annotations

import asyncio

import pytest

from tests.support.log import query
from tests.support.mcp_http import Session
from tests.support.scripted_answers import cutting, event, note, result, sending, whole
from tests.support.scripted_proxy import assert_free, messages, progress_of
from tests.support.scripted_upstream import SESSION, Exchange, ScriptedUpstream
from tests.support.until import until
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio


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
