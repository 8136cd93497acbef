"""The test server on the SDK's low-level `Server`: `echo`, `count`, `wait`, and `told`: what its handlers were told."""

from __future__ import annotations

import json

import mcp_types as types
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server

from tests.servers.common import count_up, durable_app, wait_for_file

ANY = {"type": "object"}

levels: dict[str, str] = {}
subscriptions: dict[str, list[str]] = {}


def session_of(ctx: ServerRequestContext) -> str:
    return str(ctx.session._connection.session_id)


async def set_level(ctx: ServerRequestContext, params: types.SetLevelRequestParams) -> types.EmptyResult:
    levels[session_of(ctx)] = params.level
    return types.EmptyResult()


async def subscribe(ctx: ServerRequestContext, params: types.SubscribeRequestParams) -> types.EmptyResult:
    subscriptions.setdefault(session_of(ctx), []).append(str(params.uri))
    return types.EmptyResult()


async def unsubscribe(ctx: ServerRequestContext, params: types.UnsubscribeRequestParams) -> types.EmptyResult:
    subscriptions[session_of(ctx)].remove(str(params.uri))
    return types.EmptyResult()


async def list_resources(
    ctx: ServerRequestContext, params: types.PaginatedRequestParams | None
) -> types.ListResourcesResult:
    return types.ListResourcesResult(resources=[])


async def list_tools(ctx: ServerRequestContext, params: types.PaginatedRequestParams | None) -> types.ListToolsResult:
    return types.ListToolsResult(
        tools=[types.Tool(name=name, input_schema=ANY) for name in ("echo", "count", "wait", "told")],
    )


async def call_tool(ctx: ServerRequestContext, params: types.CallToolRequestParams) -> types.CallToolResult:
    arguments = params.arguments or {}
    if params.name == "echo":
        text = str(arguments["text"])
    elif params.name == "count":
        text = await count_up(ctx.session.report_progress, int(arguments["n"]), float(arguments["seconds"]))
    elif params.name == "told":
        told = {"level": levels.get(session_of(ctx)), "subscriptions": subscriptions.get(session_of(ctx), [])}
        text = json.dumps(told)
    else:
        await wait_for_file(str(arguments["key"]))
        text = f"waited for {arguments['key']}"
    return types.CallToolResult(content=[types.TextContent(text=text)])


server = Server(
    "test-lowlevel",
    on_list_tools=list_tools,
    on_call_tool=call_tool,
    on_list_resources=list_resources,
    on_set_logging_level=set_level,
    on_subscribe_resource=subscribe,
    on_unsubscribe_resource=unsubscribe,
)
app = durable_app(server.streamable_http_app)
