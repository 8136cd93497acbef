"""A stream followed to its end by a client that loses every connection and comes back, wherever it is sent.

    call = Following(session, lambda: random.choice(urls), request_id="a")
    answer = await call.call("count", {"n": 10, "seconds": 1})
    call.events, call.ends, call.resumes

`next_url` says where each request goes. What a test asserts, and what the soak counts, is in the fields.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from tests.support.mcp_http import ConnectionCut, Response, Session
from tests.support.resuming import split_id
from tests.support.sse import Event

RETRY = 0.1
"""Seconds between attempts where the server gave no hint, and after a refusal."""

UNAVAILABLE = (502, 503, 504)
"""What a server, or a proxy before it, says when it cannot answer for now."""


class Refused(Exception):
    """The server will not begin a stream, or not go on with it: the status of its answer, and its body."""

    def __init__(self, method: str, status: int, body: bytes) -> None:
        super().__init__(f"{method}: {status} {body.decode(errors='replace')}".strip())
        self.status = status
        self.body = body


@dataclass(slots=True, eq=False)
class Following:
    """One request's stream, from the POST to its final message."""

    session: Session
    next_url: Callable[[], str]
    request_id: Any
    on_message: Callable[[Any], Awaitable[None]] | None = None
    """Told of every message but the last; a question is answered there."""
    cut_after: Callable[[], int | None] = lambda: None
    """After how many events to lose the next response; None to read it to its end."""

    cursor: str | None = None
    events: list[Event] = field(default_factory=list)
    ends: list[tuple[float, bool]] = field(default_factory=list)
    """When each response ended (`time.monotonic`), and whether cleanly."""
    cuts: int = 0
    resumes: int = 0
    refusals: int = 0
    """How often nobody took a resume: no connection, one that ended before the headers, or `UNAVAILABLE`."""
    response: Response | None = None
    """The one that is being read; `cut` it, and it is resumed."""

    async def call(self, tool: str, arguments: dict[str, Any]) -> Any:
        """Call a tool, and follow its stream: the final message.

        Raises:
            Refused: the POST was not answered with a stream, or a resume was refused for good.
            ConnectionCut, OSError: the POST met nobody, or its connection ended before the headers, or before the first
                id. Nobody can tell whether the call runs.
        """
        response = await self.session.call(
            tool, arguments, progress_token=str(self.request_id), id=self.request_id, base_url=self.next_url()
        )
        if response.status != 200:
            raise Refused("POST", response.status, await response.read())
        return await self.follow(response)

    async def follow(self, response: Response) -> Any:
        """Read a response and all that come after it, to the final message."""
        while (final := await self.read(response)) is None:
            if self.cursor is None:
                raise ConnectionCut("before the first id")
            response = await self.resume()
        return final

    async def read(self, response: Response) -> Any:
        """Read one response to its end, or to where it is to be lost: the final message, if it came."""
        self.response = response
        limit = self.cut_after()
        seen = 0
        final = None
        clean = True
        try:
            async for event in response.events():
                self.cursor = event.id or self.cursor
                if event.data:
                    self.events.append(event)
                    seen += 1
                    message = event.message
                    if "method" not in message:
                        final = message
                    elif self.on_message is not None:
                        await self.on_message(message)
                if final is None and limit is not None and seen >= limit:
                    self.cuts += 1
                    response.cut()
                    return None
        except (ConnectionCut, OSError):
            response.cut()
            clean = False
        self.ends.append((time.monotonic(), clean))
        return final

    async def resume(self) -> Response:
        """Ask for what follows the cursor until somebody gives it."""
        while True:
            await asyncio.sleep(RETRY)
            try:
                response = await self.session.get(self.cursor, base_url=self.next_url())
                if response.status == 200:
                    self.resumes += 1
                    return response
                body = await response.read()
            except (ConnectionCut, OSError):
                self.refusals += 1
                continue
            if response.status not in UNAVAILABLE:
                raise Refused("GET", response.status, body)
            self.refusals += 1

    def assert_exactly_once(self) -> None:
        """What came has the numbers 1, 2, 3 of one stream; progress counts from 0."""
        ids = [split_id(event.id or "") for event in self.events]
        assert len({stream for stream, _ in ids}) <= 1, ids
        assert [seq for _, seq in ids] == list(range(1, len(ids) + 1)), ids
        told = [event.message["params"] for event in self.events if "progressToken" in event.message.get("params", {})]
        assert {params["progressToken"] for params in told} <= {str(self.request_id)}

    @property
    def stream(self) -> int:
        """The number of the stream, known from the first id on."""
        assert self.cursor is not None
        return int(split_id(self.cursor)[0])
