"""A connection that is kept for many small requests, for tests that time answers or look at their very bytes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response: its head without the date, its body, and the nanoseconds that it took."""

    head: bytes
    body: bytes
    nanoseconds: int

    @property
    def status(self) -> int:
        return int(self.head.split(b" ", 2)[1])


class KeptConnection:
    """Sends one request after the other. Only for answers that say how long they are: errors, not event streams."""

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        self._parts = urlsplit(url)
        self._headers = headers

    async def __aenter__(self) -> Self:
        assert self._parts.hostname is not None
        self._reader, self._writer = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writer.close()

    def encode(self, method: str, headers: Mapping[str, str], message: Any = None) -> bytes:
        """The bytes of a request with a JSON message, or none."""
        body = b"" if message is None else json.dumps(message).encode()
        lines = {"Host": self._parts.netloc, **self._headers, **headers}
        if message is not None:
            lines |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        head = f"{method} {self._parts.path} HTTP/1.1\r\n" + "".join(f"{key}: {lines[key]}\r\n" for key in lines)
        return head.encode("latin-1") + b"\r\n" + body

    async def send(self, encoded: bytes) -> Answer:
        """Send what `encode` made, and read the answer to its end."""
        began = time.perf_counter_ns()
        self._writer.write(encoded)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = head.rstrip().split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
        body = await self._reader.readexactly(length)
        took = time.perf_counter_ns() - began
        return Answer(b"\r\n".join(line for line in lines if not line.lower().startswith(b"date:")), body, took)
