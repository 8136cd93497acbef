"""Requests of 2026-07-28 pass a durable app untouched: what comes back is the undurable app's, byte for byte."""

# No `from __future__ import annotations`: the SDK reads the tools' annotations.

import json
from typing import Any

import pytest
from mcp.server.mcpserver import Context
from mcp_types import CLIENT_CAPABILITIES_META_KEY, CLIENT_INFO_META_KEY, PROTOCOL_VERSION_META_KEY

from mcp_pg_events import durable
from tests.integration.apps import ACCEPT, FRAMEWORKS, http_app, mcpserver
from tests.support.log import query
from tests.support.mcp_http import request
from tests.support.serving import serving

pytestmark = pytest.mark.anyio

MODERN = "2026-07-28"
ENVELOPE = {
    PROTOCOL_VERSION_META_KEY: MODERN,
    CLIENT_INFO_META_KEY: {"name": "client", "version": "1"},
    CLIENT_CAPABILITIES_META_KEY: {},
}


def message(method: str, *, meta: dict[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """A request with the envelope that this era wants in it."""
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params | {"_meta": ENVELOPE | (meta or {})}}


def routed(body: Any, **more: str) -> dict[str, str]:
    """The headers that route `body`."""
    headers = ACCEPT | {"MCP-Protocol-Version": MODERN}
    if isinstance(body, dict) and isinstance(body.get("method"), str):
        headers["Mcp-Method"] = body["method"]
        if isinstance(name := body.get("params", {}).get("name"), str):
            headers["Mcp-Name"] = name
    return headers | more


def call(tool: str, *, meta: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    return message("tools/call", meta=meta, name=tool, arguments=arguments)


DISCOVER = message("server/discover")
ECHO = call("echo", text="é \u0000 🎉")
BODIES: dict[str, Any] = {
    "discover": DISCOVER,
    "list": message("tools/list"),
    "call": ECHO,
    "call with progress": call("count", meta={"progressToken": "p"}, n=3, seconds=0),
    "call that fails": call("fail"),
    "call that asks": call("ask", question="?"),
    "unknown tool": call("nope"),
    "unknown method": message("nope/nope"),
    "no envelope": {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {}},
    "notification": {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 1}},
    "answer": {"jsonrpc": "2.0", "id": "w1.1.1", "result": {}},
    "initialize": {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {}},
    "batch": [DISCOVER],
    "no JSON": b"{",
    "no UTF-8": b"\xff\xfe",
}
REQUESTS: dict[str, tuple[str, Any, dict[str, str]]] = {
    **{name: ("POST", body, routed(body)) for name, body in BODIES.items()},
    "session id": ("POST", ECHO, routed(ECHO, **{"Mcp-Session-Id": "0" * 32})),
    "other method header": ("POST", ECHO, routed(ECHO, **{"Mcp-Method": "tools/list"})),
    "version to come": ("POST", ECHO, routed(ECHO, **{"MCP-Protocol-Version": "2027-01-01"})),
    "no version": ("POST", ECHO, routed(ECHO, **{"MCP-Protocol-Version": ""})),
    "two versions": ("POST", ECHO, routed(ECHO, **{"MCP-Protocol-Version": f"{MODERN}\r\nMCP-Protocol-Version: x"})),
    "JSON only": ("POST", ECHO, routed(ECHO, Accept="application/json")),
    "accepts nothing": ("POST", ECHO, routed(ECHO, Accept="image/png")),
    "content type": ("POST", b"{}", routed({}, **{"Content-Type": "text/plain"})),
    "foreign host": ("POST", ECHO, routed(ECHO, Host="evil.test")),
    "too large": ("POST", b"x" * (4 * 1024 * 1024 + 1), routed({})),
    "GET": ("GET", None, routed({}, **{"Last-Event-ID": "1-1"})),
    "DELETE": ("DELETE", None, routed({}, **{"Mcp-Session-Id": "0" * 32})),
    "PUT": ("PUT", None, routed({})),
}


@pytest.mark.parametrize("json_response", [False, True], ids=["sse", "json"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_the_modern_era_reaches_the_sdk_unchanged(framework: str, json_response: bool, migrated: str) -> None:
    plain, made_durable = [http_app(FRAMEWORKS[framework](), json_response=json_response) for _ in range(2)]
    async with serving(plain) as plainly, serving(durable(made_durable, migrated)) as durably:
        for name, (method, body, headers) in REQUESTS.items():
            answers = []
            for url in (plainly, durably):
                response = await request(method, f"{url}/mcp", headers=headers, body=body)
                content = await response.read()
                assert response.complete
                answers.append((response.status, response.headers | {"date": ""}, content))
            assert answers[0] == answers[1], name
            if name == "call":
                assert "é \u0000 🎉" in json.dumps(json.loads(answers[0][2]), ensure_ascii=False).replace(
                    "\\u0000", "\0"
                )
    # And nothing of it was written down.
    assert query(migrated, "SELECT count(*) FROM sessions") == [(0,)]
    assert query(migrated, "SELECT count(*) FROM streams") == [(0,)]


async def test_a_subscription_of_the_modern_era_stays_open_and_live(migrated_once: str) -> None:
    """One response that lasts: an acknowledgement, then what the server publishes, then its end with the app."""

    def app() -> Any:
        server = mcpserver()

        @server.tool()
        async def publish(ctx: Context) -> str:
            """Tell whoever listens that the tools have changed."""
            await ctx.notify_tools_changed()
            return "published"

        return server.streamable_http_app()

    listen = message("subscriptions/listen", notifications={"toolsListChanged": True})
    told = []
    for each in (app(), durable(app(), migrated_once)):
        async with serving(each) as url:
            response = await request("POST", f"{url}/mcp", headers=routed(listen), body=listen)
            events = response.events()
            heard = [(await anext(events)).message]
            await (await request("POST", f"{url}/mcp", headers=routed(call("publish")), body=call("publish"))).read()
            heard.append((await anext(events)).message)
            told.append((response.status, response.headers["content-type"], heard))
    assert told[0] == told[1]
    methods = ["notifications/subscriptions/acknowledged", "notifications/tools/list_changed"]
    assert [heard["method"] for heard in told[0][2]] == methods
