"""A call that is cancelled, or whose session ends, while its upstream has not even begun to answer: as one that answers
in JSON alone does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest

from mcp_pg_events.proxy.relay import CANCELLED_GRACE
from mcp_pg_events.session import REQUEST_CANCELLED
from tests.support.mcp_http import Session, close_all
from tests.support.scripted_upstream import Exchange, ScriptedUpstream
from tests.support.workers import run_workers

pytestmark = pytest.mark.anyio


def result(exchange: Exchange) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": exchange.id, "result": {"content": []}}).encode()


async def answers_too_late(exchange: Exchange) -> None:
    await exchange.hung_up()


async def answers_in_time(exchange: Exchange) -> None:
    await asyncio.sleep(0.5)
    await exchange.whole("200 OK", result(exchange), content_type="application/json")


async def begins_an_answer(exchange: Exchange) -> None:
    await exchange.head(content_type="application/json", content_length="100")
    await exchange.hung_up()


async def begins_a_stream(exchange: Exchange) -> None:
    await asyncio.sleep(0.5)
    await exchange.chunked()
    await exchange.hung_up()


ANSWERS: dict[str, Callable[[Exchange], Awaitable[None]]] = {
    each.__name__: each for each in (answers_too_late, answers_in_time, begins_an_answer, begins_a_stream)
}


async def test_a_cancelled_call_ends_and_its_id_is_free(migrated: str) -> None:
    asked = {name: asyncio.Event() for name in ANSWERS}

    async def answering(exchange: Exchange) -> None:
        name = exchange.message["params"]["name"]
        asked[name].set()
        await ANSWERS[name](exchange)

    async def cancelled(session: Session, name: str, elsewhere: str) -> None:
        asked[name].clear()
        calling = asyncio.create_task(session.call(name, id=name))
        async with asyncio.timeout(5):
            await asked[name].wait()
        assert await session.notify("notifications/cancelled", {"requestId": name}, base_url=elsewhere) == 202
        async with asyncio.timeout(CANCELLED_GRACE + 3):
            message = await (await calling).result()
        assert message["id"] == name
        if name == "answers_in_time":
            assert "result" in message
        else:
            assert message["error"]["code"] == REQUEST_CANCELLED
        again = await session.call("answers_in_time", id=name)
        assert "result" in await again.json()

    async with ScriptedUpstream.running() as upstream:
        upstream.on_call = [answering] * 8
        environment = {"TEST_UPSTREAM": upstream.url}
        async with run_workers("proxied_app", migrated, 2, environment=environment) as replicas:
            session = await Session.initialize(replicas[0].url)
            turns = zip(ANSWERS, [*replicas.urls, *replicas.urls[::-1]], strict=True)
            await asyncio.gather(*(cancelled(session, name, where) for name, where in turns))
            close_all()
            replicas.assert_clean_logs()


async def test_a_call_whose_session_ends_meanwhile_ends_with_it(migrated: str) -> None:
    asked = asyncio.Event()

    async def answering(exchange: Exchange) -> None:
        asked.set()
        await exchange.hung_up()

    async with ScriptedUpstream.running() as upstream:
        upstream.on_call = [answering]
        environment = {"TEST_UPSTREAM": upstream.url}
        async with run_workers("proxied_app", migrated, 2, environment=environment) as replicas:
            session = await Session.initialize(replicas[0].url)
            calling = asyncio.create_task(session.call("x", id=7))
            async with asyncio.timeout(5):
                await asked.wait()
            assert (await session.delete(base_url=replicas[1].url)).status == 200
            async with asyncio.timeout(3):
                message = await (await calling).result()
            assert message["id"] == 7 and message["error"]["data"] == {"reason": "session_ended"}
            close_all()
            replicas.assert_clean_logs()
