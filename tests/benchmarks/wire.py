"""An MCP client of blocking sockets that does as little as it can, so that it measures the server and not itself.

A response is read as raw bytes: what the benchmarks look for (an id, a moment, the last chunk) never spans two chunks,
because every subject writes an event in one piece.
"""

from __future__ import annotations

import itertools
import json
import re
import selectors
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from tests.benchmarks.figures import PERSIST, PERSIST_SQLITE

VERSION = "2025-11-25"
END = b"0\r\n\r\n"
TIMEOUT = 60.0
LENGTH = re.compile(rb"^content-length: (\d+)\r\n", re.MULTILINE | re.IGNORECASE)
EVENT_ID = re.compile(rb"^id: (\S+)\r?\n", re.MULTILINE)
MOMENT = re.compile(rb'"message":"(\d+)"')


def path_of(subject: str) -> str:
    """Where a subject's endpoint is; mcp-persist answers `/mcp` with a redirect."""
    return "/mcp/" if subject in (PERSIST, PERSIST_SQLITE) else "/mcp"


class Stream:
    """One request and the response that comes back, on a connection of its own."""

    def __init__(self, url: str, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> None:
        parts = urlsplit(url)
        self.sock = socket.create_connection((parts.hostname, parts.port), TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        lines = {"Host": parts.netloc, **headers, "Content-Length": str(len(body))}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.sock.sendall(head.encode() + b"\r\n" + body)
        self.data = bytearray()
        self.scanned = 0

    def receive(self) -> bytes:
        """What arrives next; raises when the connection ends."""
        piece = self.sock.recv(262144)
        if not piece:
            raise ConnectionError(f"The connection ended: {bytes(self.data[-300:])!r}")
        self.data += piece
        return piece

    def until(self, found: Callable[[bytearray], Any]) -> Any:
        """Read until `found` finds something in what came so far."""
        while not (result := found(self.data)):
            self.receive()
        return result

    def head(self) -> bytes:
        """Status line and headers."""
        end: int = self.until(lambda data: data.find(b"\r\n\r\n") + 1)
        head = bytes(self.data[:end])
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 202")):
            raise RuntimeError(bytes(self.data).decode(errors="replace"))
        return head

    @property
    def ended(self) -> bool:
        """Whether the last chunk is there, or as much as the head announced."""
        end = self.data.find(b"\r\n\r\n")
        if end < 0:
            return False
        length = LENGTH.search(self.data, 0, end + 2)
        return len(self.data) >= end + 4 + int(length[1]) if length else self.data.endswith(END)

    def moments(self) -> list[int]:
        """The moments of emission in what came since the last time."""
        found = [match for match in MOMENT.finditer(self.data, self.scanned)]
        if found:
            self.scanned = found[-1].end()
        return [int(match[1]) for match in found]

    def event_id(self) -> str:
        """The id of the first event, which is the priming one."""
        self.head()
        return str(self.until(EVENT_ID.search)[1], "latin-1")

    def finish(self) -> bytes:
        """Read to the end of the response, and everything that came."""
        self.head()
        while not self.ended:
            self.receive()
        self.close()
        return bytes(self.data)

    def close(self) -> None:
        self.sock.close()


class Client:
    """One MCP session."""

    def __init__(self, url: str, subject: str) -> None:
        self.url = url
        self.path = path_of(subject)
        self.headers = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}
        self._ids = itertools.count(1)
        params = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": {"name": "benchmark", "version": "0"}}
        answer = self.post({"id": 0, "method": "initialize", "params": params})
        match = re.search(rb"mcp-session-id: (\S+)", answer.head(), re.IGNORECASE)
        assert match is not None
        answer.finish()
        self.session_id = match[1].decode()
        self.headers |= {"Mcp-Session-Id": self.session_id, "MCP-Protocol-Version": VERSION}
        accepted = self.post({"method": "notifications/initialized"})
        accepted.head()
        accepted.close()

    def post(self, message: Mapping[str, Any]) -> Stream:
        body = json.dumps({"jsonrpc": "2.0", **message}, separators=(",", ":")).encode()
        return Stream(self.url, "POST", self.path, self.headers, body)

    def call(self, tool: str, **arguments: Any) -> Stream:
        """Call a tool that may send progress; the response is unread."""
        number = next(self._ids)
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": number}}
        return self.post({"id": number, "method": "tools/call", "params": params})

    def get(self, last_event_id: str | None = None, url: str | None = None) -> Stream:
        """Resume a stream, or open the standalone one, on the worker at `url`."""
        headers = self.headers | {"Accept": "text/event-stream"}
        if last_event_id is not None:
            headers["Last-Event-ID"] = last_event_id
        return Stream(url or self.url, "GET", self.path, headers)


def start_calls(
    clients: Sequence[Client], tool: str, arguments: Sequence[Mapping[str, Any]], read_at: str | None = None
) -> list[Stream]:
    """A call for each of `arguments`, dealt to the clients, each answer read at `read_at` or where it was called."""
    posted = [(clients[place % len(clients)], one) for place, one in enumerate(arguments)]
    calls = [(client, client.call(tool, **one)) for client, one in posted]
    streams = []
    for client, call in calls:
        cursor, stream = call.event_id(), call
        if read_at is not None:
            stream = client.get(cursor, read_at)
            stream.head()
            call.close()
        streams.append(stream)
    return streams


def read_all(streams: Iterable[Stream], on_piece: Callable[[Stream, int], None] | None = None) -> None:
    """Read all responses to their ends at once; `on_piece` gets each piece's stream and the moment that it came."""
    with selectors.DefaultSelector() as selector:
        waiting = 0
        for stream in streams:
            if stream.ended:
                stream.close()
                continue
            selector.register(stream.sock, selectors.EVENT_READ, stream)
            waiting += 1
        while waiting:
            ready = selector.select(TIMEOUT)
            if not ready:
                raise TimeoutError(f"{waiting} responses did not end")
            for key, _ in ready:
                stream = key.data
                stream.receive()
                if on_piece is not None:
                    on_piece(stream, time.monotonic_ns())
                if stream.ended:
                    selector.unregister(stream.sock)
                    stream.close()
                    waiting -= 1
