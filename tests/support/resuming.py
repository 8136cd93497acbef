"""A call whose client keeps losing its connection, and the check that it lost nothing else.

`ResumingCall` cuts at random points, half of the time leaving the old socket open, and resumes with `Last-Event-ID` on
a random worker, most times one that does not run the call. `assert_exactly_once` judges what it received.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.support.mcp_http import Response, Session
from tests.support.sse import Event


def split_id(event_id: str) -> tuple[str, int]:
    """The stream and the sequence number of an event id, `<stream>-<seq>`."""
    stream, _, seq = event_id.rpartition("-")
    return stream, int(seq)


@dataclass(slots=True)
class ResumingCall:
    """One `tools/call` of a tool that sends `n` progress notifications. After `run`, its fields say what happened."""

    session: Session
    workers: Sequence[str]
    rng: random.Random
    n: int
    tool: str = "count"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cuts: int = 5
    off_owner: int = 3
    request_id: Any = None

    owner: str = ""
    events: list[Event] = field(default_factory=list)
    hops: list[str] = field(default_factory=list)
    abandoned: list[Response] = field(default_factory=list)
    seconds: float = 0.0
    ended_cleanly: bool = False
    superseded_cleanly: int = 0

    async def run(self) -> None:
        """Call, lose the connection `cuts` times, resume, and read to the end."""
        if self.request_id is None:
            self.request_id = self.session.next_id()
        self.owner = self.rng.choice(self.workers)
        targets, leave_open, points = self._plan()
        started = time.monotonic()
        response = await self.session.call(
            self.tool,
            self.arguments,
            progress_token=f"token-{self.request_id}",
            id=self.request_id,
            base_url=self.owner,
        )
        last_id = await self._read(response, None, points[0])
        for hop, (target, open_) in enumerate(zip(targets, leave_open, strict=True)):
            # Without reading: what the server sends in between sits in the kernel's buffers and is lost.
            await asyncio.sleep(self.rng.uniform(0.0, 0.05))
            if open_:
                response.abandon()
                self.abandoned.append(response)
            else:
                response.cut()
            self.hops.append(target)
            response = await self.session.get(last_id, base_url=target)
            until = points[hop + 1] if hop + 1 < len(points) else None
            last_id = await self._read(response, last_id, until)
        self.ended_cleanly = response.complete
        self.seconds = time.monotonic() - started
        for old in self.abandoned:
            self.superseded_cleanly += await old.drain()

    def _plan(self) -> tuple[list[str], list[bool], list[int]]:
        """Where to resume, which sockets to leave open, and after how many events to cut."""
        others = [url for url in self.workers if url != self.owner] or list(self.workers)
        targets = [self.rng.choice(others) for _ in range(self.off_owner)]
        targets += [self.rng.choice(self.workers) for _ in range(self.cuts - self.off_owner)]
        self.rng.shuffle(targets)
        leave_open = [number % 2 == 0 for number in range(self.cuts)]
        self.rng.shuffle(leave_open)
        return targets, leave_open, sorted(self.rng.sample(range(self.n - 5), self.cuts))

    async def _read(self, response: Response, last_id: str | None, until: int | None) -> str | None:
        """Read until `until` events have come in all, or to the end. The id to resume from."""
        assert response.status == 200, (response.status, await response.read())
        assert response.headers["content-type"].startswith("text/event-stream"), response.headers
        async for event in response.events():
            if event.id is not None:
                last_id = event.id
            if event.data:
                self.events.append(event)
            if until is not None and len(self.events) >= until and last_id is not None:
                return last_id
        assert until is None, f"The response ended after {len(self.events)} events, before the cut at {until}."
        return last_id

    def assert_exactly_once(self) -> None:
        """Every progress notification and then the result, each once, in order, with contiguous ids of one stream."""
        ids = [split_id(event.id or "") for event in self.events]
        assert len({stream for stream, _ in ids}) == 1, ids
        assert [seq for _, seq in ids] == list(range(1, self.n + 2)), ids
        messages = [event.message for event in self.events]
        indexes = [int(message["params"]["message"]) for message in messages[:-1]]
        assert indexes == list(range(self.n)), indexes
        tokens = {message["params"]["progressToken"] for message in messages[:-1]}
        assert tokens == {f"token-{self.request_id}"}, tokens
        assert messages[-1]["id"] == self.request_id and "result" in messages[-1], messages[-1]
        assert self.ended_cleanly, "The last response was cut instead of ended."
        assert len(self.hops) >= self.cuts and sum(url != self.owner for url in self.hops) >= self.off_owner, self.hops
        assert self.superseded_cleanly == len(self.abandoned), "An older connection did not end cleanly."
