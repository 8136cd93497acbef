"""An upstream that answers with exactly the bytes that a test says.

    async with ScriptedUpstream.running() as upstream:
        upstream.url                                    # of its MCP endpoint
        upstream.on_call = [answer_1, ...]              # one coroutine function for each `tools/call`, in turn
        upstream.on_get = [answer_1, ...]               # for each GET
        upstream.requests                               # what came, but for the handshake and pings

`initialize`, notifications and `ping` are answered as a server would, unless `on_other` says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.tcp_proxy import reset

SESSION = "session-of-the-upstream"


@dataclass(slots=True)
class Exchange:
    """One request, and the connection to answer it on."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    writer: asyncio.StreamWriter = field(repr=False)
    reader: asyncio.StreamReader = field(repr=False)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def message(self) -> Any:
        return json.loads(self.body) if self.body else None

    @property
    def id(self) -> Any:
        return self.message["id"]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: str = "200 OK", **headers: str) -> None:
        lines = [f"HTTP/1.1 {status}", *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())]
        await self.send(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))

    async def whole(self, status: str, body: bytes = b"", **headers: str) -> None:
        """A whole answer."""
        await self.head(status, **{"content_length": str(len(body)), **headers})
        await self.send(body)

    async def stream(self) -> None:
        """The head of a stream of events, whose end is that of the connection."""
        await self.head(content_type="text/event-stream", connection="close")

    async def chunked(self) -> None:
        """The head of a stream of events whose end `last` says, so that a cut is told from an end."""
        await self.head(content_type="text/event-stream", transfer_encoding="chunked")

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def last(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def hung_up(self) -> None:
        """Return when the one who asked has closed the connection."""
        with contextlib.suppress(ConnectionError):
            assert await self.reader.read(1) == b""

    def cut(self) -> None:
        reset(self.writer)


Answer = Callable[[Exchange], Awaitable[None]]


class ScriptedUpstream:
    """See the module."""

    def __init__(self) -> None:
        self.url = ""
        self.on_call: list[Answer] = []
        self.on_get: list[Answer] = []
        self.on_other: Callable[[Exchange], Awaitable[bool]] | None = None
        self.requests: list[Exchange] = []
        self.errors: list[BaseException] = []
        self._writers: set[asyncio.StreamWriter] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, context: ssl.SSLContext | None = None) -> AsyncIterator[ScriptedUpstream]:
        """With a `context`, behind TLS."""
        upstream = cls()
        server = await asyncio.start_server(upstream._serve, "127.0.0.1", 0, ssl=context)
        scheme = "http" if context is None else "https"
        upstream.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/mcp"
        try:
            yield upstream
        finally:
            server.close()
            for writer in upstream._writers:
                writer.transport.abort()
            await server.wait_closed()

    def forget(self) -> None:
        """Begin anew for the next test."""
        self.on_call, self.on_get, self.on_other, self.requests = [], [], None, []
        assert self.errors == []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (exchange := await self._receive(reader, writer)) is not None:
                await self._answer(exchange)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except Exception as error:
            self.errors.append(error)
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.rstrip().split("\r\n")
        method, target, _ = first.split(" ")
        headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]
        length = int(dict(headers).get("content-length", "0"))
        return Exchange(method, target, headers, await reader.readexactly(length), writer, reader)

    async def _answer(self, exchange: Exchange) -> None:
        message = exchange.message if exchange.method == "POST" else None
        method = None if message is None else message.get("method")
        if self.on_other is not None and await self.on_other(exchange):
            return
        match exchange.method, method:
            case "POST", "initialize":
                result = {
                    "protocolVersion": message["params"]["protocolVersion"],
                    "capabilities": {},
                    "serverInfo": {"name": "scripted", "version": "0"},
                }
                await _json(exchange, result, mcp_session_id=SESSION)
            case "POST", "ping":
                await _json(exchange, {})
            case "POST", "tools/call":
                self.requests.append(exchange)
                await self.on_call.pop(0)(exchange)
            case "POST", _:
                await exchange.whole("202 Accepted")
            case "DELETE", _:
                self.requests.append(exchange)
                await exchange.whole("200 OK")
            case _:
                self.requests.append(exchange)
                if self.on_get:
                    await self.on_get.pop(0)(exchange)
                else:
                    await exchange.whole("405 Method Not Allowed")


async def _json(exchange: Exchange, result: Any, **headers: str) -> None:
    body = json.dumps({"jsonrpc": "2.0", "id": exchange.id, "result": result}).encode()
    await exchange.whole("200 OK", body, content_type="application/json", **headers)
