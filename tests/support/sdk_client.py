"""The SDK's own client over several workers: every request goes to a random one, and responses can be cut short."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

ENDPOINT = "http://127.0.0.1/mcp"
"""What the client believes it talks to; the transport rewrites the port."""


@dataclass(slots=True)
class Sent:
    """One HTTP request: where it went, and how its response was cut, if it was."""

    method: str
    worker: str
    last_event_id: str | None
    cut: str | None = None


@dataclass(slots=True)
class RandomWorkers(httpx2.AsyncBaseTransport):
    """Sends each request to a random worker, and cuts event streams of calls up to `cuts` times each.

    The first response to a call may end in an error (the connection was reset) or cleanly (a proxy closed it in order);
    a resumed one always ends cleanly. After an error in a resumed GET the SDK's client (2.3.0) resumes from the id that
    this GET began with, so it receives twice what the GET had brought, whatever the server does; after two it gives up.
    """

    workers: Sequence[str]
    rng: random.Random
    cuts: int = 0
    cut_after: tuple[int, int] = (1, 8)  # events; one piece of a body can carry many, where the machine is busy
    sent: list[Sent] = field(default_factory=list)
    _inner: httpx2.AsyncHTTPTransport = field(
        default_factory=lambda: httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None))
    )
    _cut_of: dict[str, int] = field(default_factory=dict)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        target = httpx2.URL(self.rng.choice(self.workers))
        headers = httpx2.Headers(request.headers)
        headers["host"] = f"{target.host}:{target.port}"
        response = await self._inner.handle_async_request(
            httpx2.Request(
                request.method,
                request.url.copy_with(host=target.host, port=target.port),
                headers=headers,
                stream=request.stream,
                extensions=request.extensions,
            )
        )
        last_event_id = request.headers.get("last-event-id")
        sent = Sent(request.method, str(target), last_event_id)
        self.sent.append(sent)
        resumes = last_event_id is not None
        call = request.method == "POST" and b'"tools/call"' in request.content
        if not (call or resumes) or not response.headers.get("content-type", "").startswith("text/event-stream"):
            return response
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        return httpx2.Response(
            response.status_code,
            headers=response.headers,
            stream=_CutStream(response.stream, self, sent, resumes),
            extensions=response.extensions,
        )

    async def aclose(self) -> None:
        await self._inner.aclose()

    def plan_cut(self, stream: str, resumed: bool) -> tuple[int, str] | None:
        """After how many events to cut this response of `stream`, and how; None to leave it whole."""
        if self._cut_of.get(stream, 0) >= self.cuts:
            return None
        kind = "end" if resumed else self.rng.choice(("error", "end"))
        return self.rng.randint(*self.cut_after), kind

    def note_cut(self, sent: Sent, stream: str, kind: str) -> None:
        """A planned cut has come."""
        sent.cut = kind
        self._cut_of[stream] = self._cut_of.get(stream, 0) + 1

    def cuts_by_stream(self) -> dict[str, int]:
        """How often each stream was cut."""
        return dict(self._cut_of)


class _CutStream(httpx2.AsyncByteStream):
    """A response body that ends early. The stream is known from its first event id, so the plan is made there."""

    def __init__(self, inner: httpx2.AsyncByteStream, owner: RandomWorkers, sent: Sent, resumed: bool) -> None:
        self._inner = inner
        self._owner = owner
        self._sent = sent
        self._resumed = resumed

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stream = self._sent.last_event_id.rpartition("-")[0] if self._sent.last_event_id else None
        planned: tuple[int, str] | None = None
        plan_made = False
        passed = 0
        async for piece in self._pieces():
            if stream is None and piece.startswith(b"id: "):
                stream = piece[4:].split(b"\r" if b"\r" in piece else b"\n", 1)[0].decode().strip().rpartition("-")[0]
            if stream is not None and not plan_made:
                planned, plan_made = self._owner.plan_cut(stream, self._resumed), True
            passed += piece.endswith(b"\n\n")
            if stream is not None and planned is not None and passed > planned[0]:
                self._owner.note_cut(self._sent, stream, planned[1])
                # Half an event may get through: a cut does not fall between events.
                if planned[1] == "error":
                    yield piece[: self._owner.rng.randrange(len(piece))]
                    raise httpx2.ReadError("The test cut the connection.")
                return
            yield piece

    async def _pieces(self) -> AsyncIterator[bytes]:
        """The body, cut where events end."""
        async for piece in self._inner:
            for event in re.findall(rb".*?\n\n|.+", piece, re.DOTALL):
                yield event

    async def aclose(self) -> None:
        await self._inner.aclose()


@contextlib.asynccontextmanager
async def sdk_session(
    workers: Sequence[str], rng: random.Random, *, cuts: int = 0, **client_options: Any
) -> AsyncIterator[tuple[ClientSession, RandomWorkers]]:
    """An initialized `ClientSession` whose every HTTP request goes to a random one of `workers`, and its transport."""
    transport = RandomWorkers(workers, rng, cuts)
    async with (
        httpx2.AsyncClient(transport=transport, timeout=httpx2.Timeout(30.0)) as http,
        streamable_http_client(ENDPOINT, http_client=http) as (read, write),
        ClientSession(read, write, **client_options) as session,
    ):
        await session.initialize()
        yield session, transport
