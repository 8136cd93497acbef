"""The SDK's `ClientSession` through haproxy. It has limits of its own, so its calls are counted, and only judged where
the server is to blame."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx2
import mcp_types as types
from mcp import ClientSession, MCPError
from mcp.client.streamable_http import streamable_http_client

from tests.soak.clients import LIFE
from tests.soak.stage import Call, Stage, now

PATIENCE = 60.0
"""How long (seconds) a call may take before its client gives up."""


class _Watched(httpx2.AsyncBaseTransport):
    """Counts the answers to questions that did not get through: this client sends each of them once."""

    def __init__(self) -> None:
        self._inner = httpx2.AsyncHTTPTransport(limits=httpx2.Limits(max_connections=None))
        self.answers_lost = 0

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        is_answer = request.method == "POST" and b'"result"' in request.content
        try:
            response = await self._inner.handle_async_request(request)
        except BaseException:
            self.answers_lost += is_answer
            raise
        self.answers_lost += is_answer and response.status_code != 202
        return response

    async def aclose(self) -> None:
        await self._inner.aclose()


class SdkClient:
    """One session after the other."""

    def __init__(self, number: int, stage: Stage, rng: random.Random) -> None:
        self.name = f"sdk {number}"
        self._stage = stage
        self._rng = rng

    async def run(self) -> None:
        while not self._stage.over.is_set():
            try:
                await self._session()
            except* (MCPError, httpx2.HTTPError, TimeoutError, OSError):
                self._stage.count("sessions of the SDK that ended early")
                await asyncio.sleep(1)

    async def _session(self) -> None:
        async def answer(context: object, params: types.ElicitRequestParams) -> types.ElicitResult:
            return types.ElicitResult(action="accept", content={"answer": params.message})

        transport = _Watched()
        async with (
            httpx2.AsyncClient(transport=transport, timeout=httpx2.Timeout(20.0)) as http,
            streamable_http_client(f"{self._stage.proxy.url}/mcp", http_client=http) as (read, write),
            ClientSession(read, write, elicitation_callback=answer) as session,
        ):
            async with asyncio.timeout(PATIENCE):
                await session.initialize()
            until = time.monotonic() + self._rng.uniform(*LIFE)
            while time.monotonic() < until and not self._stage.over.is_set():
                n = self._rng.randint(2, 20)
                arguments = {"n": n, "seconds": self._rng.uniform(0.1, 4.0)}
                await self._call(session, transport, "count", arguments, f"counted {n}")
                await self._call(session, transport, "ask", {"question": self.name}, None)

    async def _call(
        self, session: ClientSession, transport: _Watched, tool: str, arguments: dict[str, Any], expected: str | None
    ) -> None:
        call = Call(self.name, f"SDK: {tool}", "", now())
        self._stage.calls.append(call)
        began, answers_lost = time.monotonic(), transport.answers_lost
        try:
            async with asyncio.timeout(PATIENCE):
                result = await session.call_tool(tool, arguments)
        except MCPError as error:
            data = error.error.data
            call.outcome = data["reason"] if isinstance(data, dict) and "reason" in data else error.error.message
            if call.outcome == "Connection closed":
                raise
        except TimeoutError:
            if transport.answers_lost == answers_lost:
                self._stage.violation(f"{self.name}: {tool} came to no end, and no answer of the client's was lost")
            call.outcome = "its answer was lost, it waits no longer"
        else:
            call.outcome = "result"
            content = result.content[0]
            text = content.text if isinstance(content, types.TextContent) else repr(content)
            given = text if expected is not None else json.loads(text)["content"]["answer"]
            if given != (expected or self.name):
                self._stage.violation(f"{self.name}: {tool} gave {text!r}")
        finally:
            call.seconds = time.monotonic() - began
