"""A plain round robin between the client and the workers, which can cut the call's connection.

Nothing is sticky: every request is a connection of its own, and goes to the next worker in turn, whatever session it
belongs to. Next: the workers' sockets.

The first cut of a call breaks its response off in the middle; later ones end it at a chunk, as a load balancer does
with a connection that has lasted long enough. The SDK's client (2.3.0) takes a resumed response that breaks off for a
failed attempt: it asks from the *previous* `Last-Event-ID` again, and gives up after the second.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Cut", "Forwarder", "Routed"]

_EVENT_ID = re.compile(rb"(?:^|\n)id:")


@dataclass(frozen=True, slots=True)
class Routed:
    """A request went to a worker (an index). `what` is its JSON-RPC method, "listen", "resume" or the HTTP method."""

    what: str
    worker: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The call's connection to this worker was cut; `half_open` if the worker could not notice."""

    worker: int
    half_open: bool


@dataclass(slots=True, eq=False)
class _Link:
    worker: int
    client: asyncio.StreamWriter
    upstream: asyncio.StreamWriter
    resumed: bool
    cut: bool = False


class Forwarder:
    """Listens on a free port of the loopback interface and forwards to `ports` in turn."""

    def __init__(self, ports: list[int], on_event: Callable[[Routed | Cut], None]) -> None:
        self._turns = itertools.cycle(enumerate(ports))
        self._on_event = on_event
        self._call: _Link | None = None
        self._resumable = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> int:
        """Begin to accept; the port."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """End every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def cut(self, *, half_open: bool) -> None:
        """Cut the connection that carries the call, as soon as there is one that the client can resume from.

        With `half_open` only the client's side breaks, and the worker goes on believing in a reader: as when a phone
        leaves its network.
        """
        await self._resumable.wait()
        link, self._call = self._call, None
        self._resumable.clear()
        if link is None:
            return
        link.cut = True
        if link.resumed:
            link.client.write(b"0\r\n\r\n")
            link.client.close()
        else:
            link.client.transport.abort()
        if not half_open:
            link.upstream.transport.abort()
        self._on_event(Cut(link.worker, half_open))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._forward(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head, body = await _request(reader)
            worker, port = next(self._turns)
            from_worker, to_worker = await asyncio.open_connection("127.0.0.1", port)
            what = _what(head, body)
            link = _Link(worker, writer, to_worker, resumed=what == "resume")
            if what in ("tools/call", "resume"):
                self._call = link
                self._resumable.clear()
            self._on_event(Routed(what, worker))
            try:
                to_worker.write(head + body)
                await self._pass_back(from_worker, link)
            finally:
                if self._call is link:
                    self._call = None
                    self._resumable.clear()
                writer.close()
                to_worker.close()

    async def _pass_back(self, from_worker: asyncio.StreamReader, link: _Link) -> None:
        head = await from_worker.readuntil(b"\r\n\r\n")
        chunked = b"transfer-encoding: chunked" in head.lower()
        data = head
        while data:
            if not link.cut:  # half open: what the worker still sends goes nowhere
                link.client.write(data)
                await link.client.drain()
            if self._call is link and _EVENT_ID.search(data):
                self._resumable.set()  # from here on the client has something to resume from
            data = await (_chunk(from_worker) if chunked else from_worker.read(65536))


async def _chunk(reader: asyncio.StreamReader) -> bytes:
    """A whole chunk as it is on the wire, so that a cut falls between two; nothing after the last one."""
    size = await reader.readline()
    return size + await reader.readexactly(int(size, 16) + 2) if size.strip() else b""


async def _request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body of a request; the head asks for the connection to be closed after the response."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    body = await reader.readexactly(int(length[1])) if length else b""
    head = re.sub(rb"\r\nconnection:[^\r]*", b"", head, flags=re.IGNORECASE)
    return head[:-2] + b"Connection: close\r\n\r\n", body


def _what(head: bytes, body: bytes) -> str:
    if head.startswith(b"GET"):
        return "resume" if re.search(rb"\r\nlast-event-id:", head, re.IGNORECASE) else "listen"
    method = re.search(rb'"method": *"([^"]*)"', body)
    return method[1].decode() if method else head.split(b" ", 1)[0].decode()
