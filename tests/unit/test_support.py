"""The instruments of the other tests: an instrument that lies is worse than none."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from tests.support.mcp_http import ConnectionCut, request
from tests.support.sse import Comment, Event, SseParser
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.anyio

STREAM = "id: 1-0\r\nretry: 50\r\ndata: \r\n\r\n: keep\n\nid: 1-1\revent: message\rdata: ä\rdata: b\r\r".encode()


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_events_are_the_same_however_the_bytes_are_cut(size: int) -> None:
    parser = SseParser()
    found = [item for start in range(0, len(STREAM), size) for item in parser.feed(STREAM[start : start + size])]
    found += parser.feed(b"\n")
    assert found == [Event("1-0", "message", "", 50), Comment("keep"), Event("1-1", "message", "ä\nb", None)]


async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A chunked answer; to a request for /cut, one whose last chunk never comes."""
    line = await reader.readline()
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n")
    if b"/cut" not in line:
        writer.write(b"0\r\n\r\n")
    await writer.drain()
    writer.close()


async def test_a_clean_end_is_told_from_a_cut() -> None:
    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        clean = await request("GET", base + "/")
        assert (await clean.read(), clean.complete) == (b"ok", True)
        cut = await request("GET", base + "/cut")
        with pytest.raises(ConnectionCut):
            await cut.read()
        assert (bytes(cut.raw), cut.complete) == (b"ok", False)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(100):
            writer.write(piece)
    writer.close()


async def test_the_proxy_passes_freezes_cuts_and_refuses() -> None:
    async with (
        await asyncio.start_server(echo, "127.0.0.1", 0) as server,
        TcpProxy.to("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy,
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"one")
        assert await reader.readexactly(3) == b"one"

        proxy.freeze()
        writer.write(b"two")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(3), 0.1)
        proxy.thaw()
        assert await reader.readexactly(3) == b"two"

        proxy.cut()
        with pytest.raises(ConnectionError):
            await reader.readexactly(1)
        writer.close()

        await proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)

        await proxy.restore()
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"new")
        assert await reader.readexactly(3) == b"new"
        writer.close()
        await writer.wait_closed()
