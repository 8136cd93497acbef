"""An event of 50 MB passes through a replica, live and from another one's log."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.support.mcp_http import Session, close_all
from tests.support.scripted_upstream import Exchange, ScriptedUpstream
from tests.support.workers import run_workers

pytestmark = pytest.mark.anyio

SIZE = 50 * 1024 * 1024
LIMIT = 64 * 1024 * 1024


async def test_an_event_of_fifty_megabytes_arrives_and_can_be_resumed(migrated: str) -> None:
    text = "0123456789abcde\n" * (SIZE // 16)

    def message(exchange: Exchange, **more: Any) -> bytes:
        return json.dumps({"jsonrpc": "2.0", **more}).encode()

    async def answer(exchange: Exchange) -> None:
        await exchange.chunked()
        note = message(exchange, method="notifications/message", params={"level": "info", "data": text})
        await exchange.chunk(b"id: a\ndata: " + note + b"\n\n")
        result = message(exchange, id=exchange.id, result={"content": [{"type": "text", "text": text}]})
        # In pieces of another size than that of any buffer, as it comes over a network.
        whole = b"id: b\ndata: " + result + b"\n\n"
        for start in range(0, len(whole), 999_983):
            await exchange.chunk(whole[start : start + 999_983])
        await exchange.last()

    async with ScriptedUpstream.running() as upstream:
        upstream.on_call = [answer]
        options = {"proxy": {"max_message_size": LIMIT}}
        environment = {"TEST_UPSTREAM": upstream.url}
        async with run_workers("proxied_app", migrated, 2, environment=environment, options=options) as replicas:
            session = await Session.initialize(replicas[0].url)
            response = await session.call("large", base_url=replicas[0].url)
            async with asyncio.timeout(60):
                events = [event async for event in response.events()]
            note, result = [event.message for event in events if event.data]
            assert note["params"]["data"] == text
            assert result["result"]["content"][0]["text"] == text
            first = next(event.id for event in events if event.data)
            again = await session.get(first, base_url=replicas[1].url)
            async with asyncio.timeout(60):
                [resumed] = [event.message async for event in again.events() if event.data]
            assert resumed == result
            close_all()
            # On a busy machine an event of this size takes longer than the log takes for granted.
            replicas.assert_clean_logs("The database takes")
