"""A TCP proxy that misbehaves on request, to stand between a worker and PostgreSQL or a client and a worker.

async with TcpProxy.to(host, port) as proxy:
    proxy.port              # connect here
    proxy.cut()             # reset every connection; new ones are welcome
    proxy.lead(host, port)  # new connections go there
    await proxy.refuse()    # stop listening as well: "connection refused"
    proxy.freeze()          # accept, but pass nothing on in either direction
    proxy.mute()            # pass what clients send, and hold the answers back
    await proxy.holding()   # something is being held back
    proxy.delay = 0.05      # seconds that every piece waits, each way
    await proxy.restore()   # everything passes again
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable

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
        self._answer = asyncio.Event()
        self._answer.set()
        self._held = asyncio.Event()
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
        self.thaw()
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    def lead(self, host: str, port: int) -> None:
        self._target = (host, port)

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
        self._held.clear()
        self._pass.clear()

    def mute(self) -> None:
        """Pass on what clients send, and none of the answers: what became of a request stays unknown."""
        self._held.clear()
        self._answer.clear()

    async def holding(self) -> None:
        """Wait until something is held back by `freeze` or `mute`."""
        await asyncio.wait_for(self._held.wait(), 10)

    def thaw(self) -> None:
        """Pass on what `freeze` or `mute` held back, and all that follows."""
        self._pass.set()
        self._answer.set()

    def editor(self) -> Callable[[bytes], bytes]:
        """For one connection: what of the target's bytes to pass on. A subclass may be choosy."""
        return bytes

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
                await asyncio.gather(
                    self._pump(reader, downstream, (self._pass,)),
                    self._pump(upstream, writer, (self._pass, self._answer), self.editor()),
                )
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

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        gates: tuple[asyncio.Event, ...],
        edit: Callable[[bytes], bytes] = bytes,
    ) -> None:
        while piece := await reader.read(65536):
            if self.delay:
                await asyncio.sleep(self.delay)
            for gate in gates:
                if not gate.is_set():
                    self._held.set()
                    await gate.wait()
            writer.write(edit(piece))
            await writer.drain()
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()
