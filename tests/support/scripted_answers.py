"""What a scripted upstream sends, for `on_call` and `on_get`: streams that end, are cut or go on, and whole answers.

upstream.on_call = [cutting(event(note(1), "a"))]
upstream.on_get = [going_on(upstream.requests, event(note(2), "b"))]
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.support.scripted_upstream import Answer, Exchange


def note(number: int) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progress": number}}).encode()


def result(exchange: Exchange, **more: Any) -> bytes:
    message = {"jsonrpc": "2.0", "id": exchange.id, "result": {"content": []}, **more}
    return json.dumps(message).encode()


def event(data: bytes, event_id: str | None = None) -> bytes:
    return (b"" if event_id is None else f"id: {event_id}\n".encode()) + b"event: message\ndata: " + data + b"\n\n"


def sending(*pieces: bytes, final: bool = True) -> Answer:
    """A stream of these bytes and then, if it is `final`, the answer."""

    async def answer(exchange: Exchange) -> None:
        await exchange.stream()
        for piece in pieces:
            await exchange.send(piece)
        if final:
            await exchange.send(event(result(exchange)))
        exchange.writer.close()

    return answer


def whole(status: str, body: bytes = b"", **headers: str) -> Answer:
    async def answer(exchange: Exchange) -> None:
        await exchange.whole(status, body, **headers)

    return answer


def cutting(*pieces: bytes) -> Answer:
    """A stream that is cut in the middle of something."""

    async def answer(exchange: Exchange) -> None:
        await exchange.chunked()
        for piece in pieces:
            await exchange.chunk(piece)
        await asyncio.sleep(0.05)  # what was sent is to arrive before the reset, which drops it otherwise
        exchange.cut()

    return answer


def going_on(call: list[Exchange], *pieces: bytes) -> Answer:
    """A resumed stream, which ends with the answer to the call that was made first."""

    async def answer(exchange: Exchange) -> None:
        await exchange.stream()
        for piece in pieces:
            await exchange.send(piece)
        await exchange.send(event(result(call[0]), "last"))
        exchange.writer.close()

    return answer
