"""MCP over Streamable HTTP with nothing between the test and the wire.

Every request has a TCP connection of its own, so that a test can reset it, leave it half open, and see whether the
chunked body came to its end.

    session = await Session.initialize(url)
    response = await session.call("count", {"n": 3, "seconds": 1}, progress_token="p")
    async for event in response.events(): ...
    response.cut()                                      # or .abandon()
    response = await session.get(last_event_id, base_url=other_url)
    assert response.complete                            # after the last event: the terminating chunk arrived
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from tests.support.sse import Comment, Event, SseParser
from tests.support.tcp_proxy import reset

LATEST = "2025-11-25"
LIMIT = 2**20
TIMEOUT = 30.0
"""Seconds that a response may take until its headers are there, and that reading may wait for the next bytes."""


_open: set[asyncio.StreamWriter] = set()


def close_all() -> None:
    """Close what the tests left open; `start_workers` does it when a test ends."""
    for writer in _open:
        reset(writer)
    _open.clear()


class ConnectionCut(Exception):
    """The connection ended before the response did."""


class Response:
    """One HTTP response: its head is read, its body is read as the test asks for it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        _open.add(writer)
        self.head = b""
        self.status = 0
        self.headers: dict[str, str] = {}
        self.complete = False
        """The body ended as HTTP says: with the terminating chunk, or with as many bytes as announced."""
        self.comments: list[str] = []
        self.raw = bytearray()
        """The body so far, without the framing of chunks."""

    async def read_head(self) -> None:
        try:
            async with asyncio.timeout(TIMEOUT):
                self.head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as cause:
            raise ConnectionCut("before the headers") from cause
        status, *lines = self.head.decode("latin-1").rstrip().split("\r\n")
        self.status = int(status.split(" ")[1])
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises ConnectionCut when the connection ends before the body does."""
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while True:
                    size = int((await self._read(self._reader.readuntil(b"\r\n"))).split(b";")[0], 16)
                    piece = (await self._read(self._reader.readexactly(size + 2)))[:size]
                    if size == 0:
                        break
                    self.raw += piece
                    yield piece
            else:
                remaining = int(self.headers.get("content-length", "0"))
                while remaining:
                    piece = await self._read(self._reader.read(min(remaining, LIMIT)))
                    if not piece:
                        raise ConnectionCut("in the body")
                    remaining -= len(piece)
                    self.raw += piece
                    yield piece
        except (asyncio.IncompleteReadError, ConnectionError) as cause:
            self.close()
            raise ConnectionCut("in the body") from cause
        self.complete = True
        self.close()

    async def _read(self, reading: Any) -> bytes:
        async with asyncio.timeout(TIMEOUT):
            return bytes(await reading)

    async def events(self) -> AsyncIterator[Event]:
        """The events of the body; comments collect in `comments`."""
        parser = SseParser()
        async for piece in self.pieces():
            for item in parser.feed(piece):
                if isinstance(item, Comment):
                    self.comments.append(item.text)
                else:
                    yield item

    async def read(self) -> bytes:
        """The whole body."""
        async for _ in self.pieces():
            pass
        return bytes(self.raw)

    async def json(self) -> Any:
        """The whole body, parsed as JSON."""
        return json.loads(await self.read())

    async def messages(self) -> list[Any]:
        """All JSON-RPC messages until the body ends: those of an event stream, or the one of a JSON body."""
        if self.headers.get("content-type", "").startswith("text/event-stream"):
            return [event.message async for event in self.events() if event.data]
        return [await self.json()]

    async def result(self) -> Any:
        """The last JSON-RPC message of the body: for a request, its response."""
        return (await self.messages())[-1]

    def close(self) -> None:
        """Close the connection in order."""
        self._writer.close()
        _open.discard(self._writer)

    def cut(self) -> None:
        """Reset the connection; what arrived and was not read is lost."""
        reset(self._writer)
        _open.discard(self._writer)

    def abandon(self) -> None:
        """Stop reading and leave the connection open: the client that went out of range. `close` or `cut` it later."""
        with contextlib.suppress(RuntimeError):
            self._writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def drain(self) -> bool:
        """Read an abandoned response to its end; whether it ended cleanly."""
        with contextlib.suppress(RuntimeError):
            self._writer.transport.resume_reading()  # type: ignore[attr-defined]
        try:
            await self.read()
        except (ConnectionCut, TimeoutError, ValueError):
            return False
        finally:
            self.close()
        return self.complete

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


async def request(
    method: str,
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    body: bytes | Any = None,
    receive_buffer: int | None = None,
) -> Response:
    """Send one request on a connection of its own, and read the head of the response.

    `body` is sent as JSON, or as it is when it is bytes: framed already, with a `Transfer-Encoding` among the headers.
    A small `receive_buffer`, in bytes, makes a client that stops reading felt by the server at once.
    """
    parts = urlsplit(url)
    payload = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {"Host": parts.netloc, **(headers or {})}
    if body is not None:
        lines.setdefault("Content-Type", "application/json")
        if "Transfer-Encoding" not in lines:
            lines["Content-Length"] = str(len(payload))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items())
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    try:
        await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or LIMIT)
    except BaseException:
        sock.close()
        raise
    response = Response(reader, writer)
    try:
        writer.write(head.encode("latin-1") + b"\r\n" + payload)
        await writer.drain()
        await response.read_head()
    except BaseException:
        response.cut()
        raise
    return response


class Session:
    """A handshake-era MCP session. Each method takes `base_url` to send its request to another worker."""

    def __init__(self, base_url: str, *, path: str = "/mcp", headers: Mapping[str, str] | None = None) -> None:
        self.base_url = base_url
        self.path = path
        self.extra_headers = dict(headers or {})
        self.session_id: str | None = None
        self.version: str | None = None
        self.initialize_result: Any = None
        self._ids = itertools.count(1)

    @classmethod
    async def initialize(
        cls,
        base_url: str,
        version: str = LATEST,
        *,
        capabilities: Mapping[str, Any] | None = None,
        client: str = "test-client",
        headers: Mapping[str, str] | None = None,
        path: str = "/mcp",
        initialized: bool = True,
    ) -> Session:
        """Shake hands; `initialized=False` leaves out `notifications/initialized`."""
        session = cls(base_url, path=path, headers=headers)
        params = {
            "protocolVersion": version,
            "capabilities": dict(capabilities or {}),
            "clientInfo": {"name": client, "version": "0"},
        }
        response = await session.request("initialize", params, id=0)
        assert response.status == 200, (response.status, await response.read())
        session.initialize_result = (await response.result())["result"]
        session.session_id = response.headers.get("mcp-session-id")
        session.version = session.initialize_result["protocolVersion"]
        if initialized:
            accepted = await session.notify("notifications/initialized")
            assert accepted == 202, accepted
        return session

    def headers(self, **more: str) -> dict[str, str]:
        """The headers that every request of the session carries."""
        headers = {"Accept": "application/json, text/event-stream", **self.extra_headers}
        if self.session_id is not None:
            headers["Mcp-Session-Id"] = self.session_id
        if self.version is not None:
            headers["MCP-Protocol-Version"] = self.version
        return headers | more

    def url(self, base_url: str | None = None) -> str:
        return (base_url or self.base_url) + self.path

    async def post(
        self, message: Any, *, base_url: str | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """POST a JSON-RPC message (or bytes, as they are) and return the response with its body unread."""
        return await request("POST", self.url(base_url), headers=self.headers(**(headers or {})), body=message)

    async def get(
        self,
        last_event_id: str | None = None,
        *,
        base_url: str | None = None,
        headers: Mapping[str, str] | None = None,
        receive_buffer: int | None = None,
    ) -> Response:
        """Open the standalone stream, or resume the stream of `last_event_id`."""
        more = {"Accept": "text/event-stream", **(headers or {})}
        if last_event_id is not None:
            more["Last-Event-ID"] = last_event_id
        return await request("GET", self.url(base_url), headers=self.headers(**more), receive_buffer=receive_buffer)

    async def delete(self, *, base_url: str | None = None) -> Response:
        """End the session."""
        return await request("DELETE", self.url(base_url), headers=self.headers())

    def next_id(self) -> int:
        """A request id that this session has not used."""
        return next(self._ids)

    async def request(
        self, method: str, params: Mapping[str, Any] | None = None, *, id: Any = None, base_url: str | None = None
    ) -> Response:
        """POST a request. `id` is sent verbatim; by default a new integer."""
        message = {"jsonrpc": "2.0", "id": self.next_id() if id is None else id, "method": method}
        return await self.post(message if params is None else message | {"params": params}, base_url=base_url)

    async def call(
        self,
        tool: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        progress_token: str | int | None = None,
        id: Any = None,
        base_url: str | None = None,
    ) -> Response:
        """POST `tools/call`; with a `progress_token` the server may send progress."""
        params: dict[str, Any] = {"name": tool, "arguments": dict(arguments or {})}
        if progress_token is not None:
            params["_meta"] = {"progressToken": progress_token}
        return await self.request("tools/call", params, id=id, base_url=base_url)

    async def call_result(
        self, tool: str, arguments: Mapping[str, Any] | None = None, *, base_url: str | None = None
    ) -> Any:
        """Call a tool to its end: the text of its result. A JSON-RPC error or a tool's error fails the test."""
        answer = await (await self.call(tool, arguments, base_url=base_url)).result()
        assert "result" in answer and not answer["result"].get("isError"), answer
        return answer["result"]["content"][0]["text"]

    async def whoami(self, *, base_url: str | None = None) -> Any:
        """What the server knows: pid, session_id, protocol_version, capabilities, client."""
        return json.loads(await self.call_result("whoami", base_url=base_url))

    async def notify(self, method: str, params: Mapping[str, Any] | None = None, *, base_url: str | None = None) -> int:
        """POST a notification; the status of the answer."""
        message = {"jsonrpc": "2.0", "method": method}
        response = await self.post(message if params is None else message | {"params": params}, base_url=base_url)
        await response.read()
        return response.status

    async def answer(self, id: Any, result: Any, *, base_url: str | None = None) -> int:
        """POST the result of a request that the server sent; the status of the answer."""
        response = await self.post({"jsonrpc": "2.0", "id": id, "result": result}, base_url=base_url)
        await response.read()
        return response.status
