"""Is an upstream there, does it speak Streamable HTTP, and what can its clients expect: `proxy --check`.

It opens a session without a credential, as any client could, looks, and ends it. Next: whoever shows the `Check`s.
"""

from __future__ import annotations

import json
from typing import Any, Final

import pydantic_core
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

from ..doctor import Check
from ..responses import SESSION_ID
from .event_stream import EventStream
from .replies import messages_until
from .upstream import EVENT_STREAM, Reply, Upstream, UpstreamFailed

__all__ = ["examine"]

PATIENCE: Final = 10.0
LIMIT: Final = 1024 * 1024

_HEADERS: Final = {"content-type": "application/json", "accept": f"application/json, {EVENT_STREAM}"}


async def examine(url: str, *, verify: bool = True, ca_file: str | None = None) -> list[Check]:
    """What was found, in order; nothing after a check without which the next ones cannot be made.

    Raises:
        ConfigurationError: the URL is none of an HTTP endpoint, or the file has no certificates.
    """
    async with Upstream(url, verify=verify, ca_file=ca_file, timeout=PATIENCE, max_message_size=LIMIT) as upstream:
        return await _Examination(upstream).made()


class _Examination:
    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._checks: list[Check] = []
        self._session_id: str | None = None
        self._headers = dict(_HEADERS)

    async def made(self) -> list[Check]:
        try:
            if await self._initialize():
                await self._look()
        except UpstreamFailed as failed:
            advice = "Check the URL, and that the server runs; clients get an error until it answers."
            self._checks.append(Check("upstream", "fail", str(failed), advice))
        finally:
            await self._end()
        return self._checks

    def _found(self, name: str, found: str) -> None:
        self._checks.append(Check(name, "ok", found))

    async def _post(self, message: dict[str, Any]) -> Reply:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        return await self._upstream.request("POST", self._headers, body=body, session_id=self._session_id)

    async def _initialize(self) -> bool:
        version = HANDSHAKE_PROTOCOL_VERSIONS[-1]
        client = {"name": "mcp-pg-events", "version": "0"}
        params = {"protocolVersion": version, "capabilities": {}, "clientInfo": client}
        reply = await self._post({"id": 1, "method": "initialize", "params": params})
        status = reply.status
        if status in (401, 403):
            reply.close()
            self._checks.append(
                Check(
                    "upstream",
                    "warn",
                    f"It answers {status}: it wants a credential",
                    "Clients bring their own, and the rest cannot be looked at without one.",
                )
            )
            return False
        if 300 <= status < 400:
            target = (reply.header("location") or "another URL").partition("?")[0]
            reply.close()
            advice = "Give the proxy the URL that it leads to: it follows none, so that no credential is led away."
            self._checks.append(Check("upstream", "fail", f"It redirects to {target!r}", advice))
            return False
        if status != 200 or reply.media_type not in ("application/json", EVENT_STREAM) or reply.is_encoded:
            reply.close()
            self._checks.append(
                Check(
                    "upstream",
                    "fail",
                    f"It answers initialize with {status} and {reply.media_type or 'no content type'}",
                    "Give the URL of an MCP endpoint that speaks Streamable HTTP, with its path, such as /mcp.",
                )
            )
            return False
        answer: Any = pydantic_core.from_json((await messages_until(reply, 1, LIMIT, PATIENCE))[-1])
        result = answer.get("result")
        if not isinstance(result, dict) or not isinstance(result.get("protocolVersion"), str):
            self._checks.append(
                Check("upstream", "fail", "It refuses to initialize a session", "Look at its own log for the reason.")
            )
            return False
        self._session_id = reply.header(SESSION_ID)
        self._headers["mcp-protocol-version"] = result["protocolVersion"]
        server = result.get("serverInfo")
        name = server.get("name") if isinstance(server, dict) else None
        version = result["protocolVersion"]
        self._found("upstream", f"{name or 'a server'!r} speaks Streamable HTTP, {version!r}")
        self._found(
            "session",
            "It has sessions" if self._session_id else "It has no sessions; the proxy gives its clients one of its own",
        )
        return True

    async def _look(self) -> None:
        (await self._post({"method": "notifications/initialized"})).close()
        reply = await self._post({"id": 2, "method": "ping"})
        if reply.is_stream:
            ids = False
            events = EventStream(LIMIT)
            async for chunk in reply.chunks():
                ids = ids or any(event.id is not None for event in events.feed(chunk))
            reply.close()
            if ids:
                self._found("events", "They have ids: when a replica of the proxy dies, another goes on with its calls")
            else:
                self._checks.append(
                    Check(
                        "events",
                        "warn",
                        "They have no ids: when a replica of the proxy dies, the calls that it read end with an error",
                        "Clients resume all the same while the replica lives; an event store in the upstream cures it.",
                    )
                )
        else:
            reply.close()
            self._found("events", "It answers in JSON, which is passed through: such calls have nothing to resume")
        listening = {**self._headers, "accept": EVENT_STREAM}
        reply = await self._upstream.request("GET", listening, session_id=self._session_id)
        offered = reply.is_stream
        reply.close()
        self._found("standalone", "It offers the standalone stream" if offered else "It offers no standalone stream")

    async def _end(self) -> None:
        if self._session_id is not None:
            try:
                (await self._upstream.request("DELETE", self._headers, session_id=self._session_id)).close()
            except UpstreamFailed:
                pass
