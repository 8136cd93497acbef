"""A TCP proxy that misbehaves on request, to stand between a worker and PostgreSQL or a client and a worker.

async with TcpProxy.to(host, port) as proxy:
    proxy.port              # connect here
    proxy.cut()             # reset every connection; new ones are welcome
    await proxy.refuse()    # stop listening as well: "connection refused"
    proxy.freeze()          # accept, but pass nothing on in either direction
    proxy.delay = 0.05      # seconds that every piece waits, each way
    await proxy.restore()   # everything passes again
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

from tests.support.postgres import free_port


def reset(writer: asyncio.StreamWriter) -> None:
    """Close a connection with RST, as a crashed peer or a router does, dropping what was not sent."""
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class TcpProxy:
    """Forwards connections from `port` to a target; its methods make it fail."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.port = free_port()
        self.delay = 0.0
        self.accepted = 0
        self._pass = asyncio.Event()
        self._pass.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, host: str, port: int) -> AsyncIterator[TcpProxy]:
        """Run a proxy to `host`:`port` until the block ends."""
        proxy = cls(host, port)
        await proxy.restore()
        try:
            yield proxy
        finally:
            await proxy.close()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._writers) // 2

    async def restore(self) -> None:
        """Listen, and pass everything at once."""
        self.delay = 0.0
        self._pass.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def cut(self) -> None:
        """Reset all connections on both sides."""
        for writer in tuple(self._writers):
            reset(writer)

    async def refuse(self) -> None:
        """Stop listening, and reset all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.cut()

    def freeze(self) -> None:
        """Keep all connections, accept new ones, and pass nothing on: a network that has gone deaf."""
        self._pass.clear()

    def thaw(self) -> None:
        """Pass on what `freeze` held back, and all that follows."""
        self._pass.set()

    async def close(self) -> None:
        """Refuse everything and end the proxy's own tasks."""
        await self.refuse()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.accepted += 1
        try:
            try:
                upstream, downstream = await asyncio.open_connection(*self._target)
            except OSError:
                reset(writer)
                return
            pair = {writer, downstream}
            self._writers |= pair
            try:
                await asyncio.gather(self._pump(reader, downstream), self._pump(upstream, writer))
            except OSError:
                reset(writer)
                reset(downstream)
            finally:
                self._writers -= pair
                writer.close()
                downstream.close()
        except asyncio.CancelledError:
            # The proxy closes. A cancelled handler would be reported by asyncio.
            reset(writer)
        finally:
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(65536):
            if self.delay:
                await asyncio.sleep(self.delay)
            await self._pass.wait()
            writer.write(piece)
            await writer.drain()
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()
