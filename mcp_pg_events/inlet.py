"""The dispatcher's read stream: what `http.py` and `inbox.py` bring to a session, in order.

Next: the SDK's dispatcher, and the user's handlers.
"""

from __future__ import annotations

import contextvars
import logging
from types import TracebackType

import anyio
from mcp.shared.message import SessionMessage

__all__ = ["Inlet"]

logger = logging.getLogger(__name__)


class Inlet:
    """The dispatcher's read stream: never full, and each message comes with its sender's context variables."""

    def __init__(self) -> None:
        self._send, self._receive = anyio.create_memory_object_stream[tuple[contextvars.Context, SessionMessage]](
            float("inf")
        )
        self.last_context: contextvars.Context | None = None

    def put(self, message: SessionMessage) -> None:
        try:
            self._send.send_nowait((contextvars.copy_context(), message))
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            logger.debug("Dropped a message: the session's loop has ended")

    async def receive(self) -> SessionMessage | Exception:
        self.last_context, message = await self._receive.receive()
        return message

    async def aclose(self) -> None:
        self._send.close()
        self._receive.close()

    def __aiter__(self) -> Inlet:
        return self

    async def __anext__(self) -> SessionMessage | Exception:
        try:
            return await self.receive()
        except anyio.EndOfStream:
            raise StopAsyncIteration from None

    async def __aenter__(self) -> Inlet:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
