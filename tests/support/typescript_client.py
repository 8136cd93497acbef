"""The TypeScript SDK's client (`@modelcontextprotocol/sdk`) in a process of its own, for any URL.

    async with typescript_client(node, url, calls=proxy.url) as client:
        call = await client.call("echo", text="hello")
        event = await client.event("result", key=call)
        client.events           # everything so far, in order

Events are what `tests/conformance/typescript_client.mjs` tells: `response` (a request of the client's was answered:
`of` what, by which `worker`), `cursor` (an event id came on the stream of a call), `progress`, `log`, `elicitation`
(which it accepts), `result`, `error`, and `trouble` (what the transport reports to its owner).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.node import LOCK, Node
from tests.support.postgres import die_with_parent

SCRIPT = LOCK.with_name("typescript_client.mjs")

Event = dict[str, Any]


@dataclass(slots=True)
class TypeScriptClient:
    """A connected client. Calls have keys, since the client keeps its request ids to itself."""

    process: asyncio.subprocess.Process
    errors: Path
    events: list[Event] = field(default_factory=list)
    _calls: int = 0

    async def request(self, method: str, params: dict[str, Any] | None = None) -> str:
        """Send a request; its key in the events that belong to it."""
        self._calls += 1
        key = f"call {self._calls}"
        await self._do({"do": "request", "key": key, "method": method, "params": params or {}})
        return key

    async def call(self, tool: str, **arguments: Any) -> str:
        """Call a tool; its key in the events that belong to it."""
        return await self.request("tools/call", {"name": tool, "arguments": arguments})

    async def cancel(self, key: str) -> None:
        """Abort a request, as the client's user does: the server is notified."""
        await self._do({"do": "cancel", "key": key})

    def told(self, event: str, **values: Any) -> list[Event]:
        """The events so far of this kind that have these values."""
        return [told for told in self.events if told.items() >= {"event": event, **values}.items()]

    async def event(self, event: str, timeout: float = 20.0, *, nth: int = 1, **values: Any) -> Event:
        """The nth event of this kind that has these values, when it has come."""
        try:
            async with asyncio.timeout(timeout):
                while len(found := self.told(event, **values)) < nth:
                    await self.more()
        except TimeoutError:
            told = "\n".join(map(str, self.events[-40:]))
            raise AssertionError(f"No {event} {values} within {timeout} s. The last events were:\n{told}") from None
        return found[nth - 1]

    async def more(self) -> None:
        """Take the next event, whatever it is, to the end of `events`."""
        assert self.process.stdout is not None
        if not (line := await self.process.stdout.readline()):
            raise AssertionError(f"The client ended: {self.errors.read_text()}")
        self.events.append(json.loads(line))

    async def _do(self, command: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        await self.process.stdin.drain()


@contextlib.asynccontextmanager
async def typescript_client(
    node: Node, url: str, *, calls: str | None = None, listening: str | None = None
) -> AsyncIterator[TypeScriptClient]:
    """Connect a client to the server at `url`, with its standalone stream open, until the block ends.

    `calls` is another way to the same server, for calls and whatever resumes one; `listening` one for the standalone
    stream.
    """
    with tempfile.NamedTemporaryFile(prefix="typescript-client-") as errors:
        process = await asyncio.create_subprocess_exec(
            # Not by its path: Node looks for packages beside the script, and here they are elsewhere.
            *(node.binary, "--input-type=module", "--eval", SCRIPT.read_text()),
            *(f"{base}/mcp" for base in (url, calls or url, listening or url)),
            cwd=node.folder,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            limit=2**24,
            preexec_fn=die_with_parent(signal.SIGKILL),
        )
        client = TypeScriptClient(process, Path(errors.name))
        try:
            await client.event("connected")
            await client.event("response", of="GET", status=200)
            yield client
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
