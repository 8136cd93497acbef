"""The server that the official conformance suite asks for, on the MCP SDK's `MCPServer`.

    uvicorn tests.conformance.everything_server:app

It is durable when MCP_PG_EVENTS_DSN is set, and the SDK's own, for comparison, when it is not or TEST_DURABLE is 0. The
names, texts and schemas are those that the suite expects; nothing here is made to please it in any other way. What the
2026-07-28 revision adds is in `modern_features.py`.
"""

# No `from __future__ import annotations`: the SDK reads the annotations of tools.

import asyncio
import base64
import json
import os
import warnings
from typing import Any

import mcp_types as types
from mcp.server import ServerRequestContext
from mcp.server.mcpserver import Audio, Context, Image, MCPServer, RequestStateSecurity, UserMessage
from mcp.server.mcpserver.exceptions import ToolError
from mcp.server.mcpserver.tools import Tool
from mcp.shared.exceptions import MCPDeprecationWarning

from tests.conformance import modern_features
from tests.support.memory_events import MemoryEventStore

# Logging and sampling are deprecated in 2026-07-28. Here they serve clients of earlier revisions.
warnings.filterwarnings("ignore", category=MCPDeprecationWarning)

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
WAV = (
    b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00\x40\x1f\x00\x00\x40\x1f\x00\x00\x01\x00\x08\x00data"
    + bytes(4)
)
RETRY_INTERVAL = 100
"""Milliseconds after which a client comes back."""

SCHEMA_2020_12: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "$defs": {
        "address": {
            "$anchor": "addressDef",
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
        }
    },
    "properties": {
        "name": {"type": "string"},
        "address": {"$ref": "#/$defs/address"},
        "contactMethod": {"type": "string", "enum": ["phone", "email"]},
        "phone": {"type": "string"},
        "email": {"type": "string"},
    },
    "allOf": [{"anyOf": [{"required": ["phone"]}, {"required": ["email"]}]}],
    "if": {"properties": {"contactMethod": {"const": "phone"}}, "required": ["contactMethod"]},
    "then": {"required": ["phone"]},
    "else": {"required": ["email"]},
    "additionalProperties": False,
}

DEFAULTS: types.ElicitRequestedSchema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "default": "John Doe"},
        "age": {"type": "integer", "default": 30},
        "score": {"type": "number", "default": 95.5},
        "status": {"type": "string", "enum": ["active", "inactive", "pending"], "default": "active"},
        "verified": {"type": "boolean", "default": True},
    },
}

OPTIONS = [{"const": f"value{n}", "title": f"Option {n}"} for n in (1, 2, 3)]
ENUMS: types.ElicitRequestedSchema = {
    "type": "object",
    "properties": {
        "untitledSingle": {"type": "string", "enum": ["option1", "option2", "option3"]},
        "titledSingle": {"type": "string", "oneOf": OPTIONS},
        "legacyEnum": {
            "type": "string",
            "enum": ["opt1", "opt2", "opt3"],
            "enumNames": ["Option One", "Option Two", "Option Three"],
        },
        "untitledMulti": {"type": "array", "items": {"type": "string", "enum": ["option1", "option2", "option3"]}},
        "titledMulti": {"type": "array", "items": {"anyOf": OPTIONS}},
    },
}

USER: types.ElicitRequestedSchema = {
    "type": "object",
    "properties": {
        "username": {"type": "string", "description": "User's response"},
        "email": {"type": "string", "description": "User's email address"},
    },
    "required": ["username", "email"],
}


def json_schema_2020_12_tool() -> str:
    """Have an input schema with keywords that a server must not drop."""
    return "json_schema_2020_12_tool"


server = MCPServer(
    "conformance",
    version="1.0.0",
    # `MCPServer.tool` derives the schema from the function; here it is given.
    tools=[Tool.from_function(json_schema_2020_12_tool).model_copy(update={"parameters": SCHEMA_2020_12})],
    # One key for all workers: a request of the 2026-07-28 revision may end on another one than it began on.
    request_state_security=RequestStateSecurity(keys=[b"the same key on every worker of the tests"]),
    log_level="WARNING",
)
modern_features.register(server)


# --- tools ------------------------------------------------------------------------------------------------------------


@server.tool()
def test_simple_text() -> str:
    """Return a text."""
    return "This is a simple text response for testing."


@server.tool()
def test_image_content() -> Image:
    """Return an image."""
    return Image(data=PNG, format="png")


@server.tool()
def test_audio_content() -> Audio:
    """Return a sound."""
    return Audio(data=WAV, format="wav")


@server.tool()
def test_embedded_resource() -> types.EmbeddedResource:
    """Return a resource with its content."""
    return embedded("test://embedded-resource", "This is an embedded resource content.")


@server.tool(structured_output=False)
def test_multiple_content_types() -> list[Any]:
    """Return a text, an image and a resource."""
    content = json.dumps({"test": "data", "value": 123})
    return [
        "Multiple content types test:",
        Image(data=PNG, format="png"),
        embedded("test://mixed-content-resource", content, "application/json"),
    ]


@server.tool()
async def test_tool_with_logging(ctx: Context) -> str:
    """Send three log entries, with pauses."""
    await ctx.info("Tool execution started")
    await asyncio.sleep(0.05)
    await ctx.info("Tool processing data")
    await asyncio.sleep(0.05)
    await ctx.info("Tool execution completed")
    return "Three log entries were sent."


@server.tool()
async def test_tool_with_progress(ctx: Context) -> str:
    """Report progress three times, with pauses."""
    for progress in (0, 50, 100):
        await ctx.report_progress(progress, 100, f"Completed step {progress} of 100")
        await asyncio.sleep(0.05)
    return "Progress was reported three times."


@server.tool()
async def test_sampling(prompt: str, ctx: Context) -> str:
    """Ask the client's model."""
    message = types.SamplingMessage(role="user", content=types.TextContent(text=prompt))
    answer = await ctx.session.create_message([message], max_tokens=100, related_request_id=ctx.request_id)
    return f"LLM response: {answer.content.text}"


@server.tool()
async def test_elicitation(message: str, ctx: Context) -> str:
    """Ask the user."""
    return f"User response: {await ask(ctx, message, USER)}"


@server.tool()
async def test_elicitation_sep1034_defaults(ctx: Context) -> str:
    """Ask the user with a form that has defaults."""
    return f"Elicitation completed: {await ask(ctx, 'Please check these values', DEFAULTS)}"


@server.tool()
async def test_elicitation_sep1330_enums(ctx: Context) -> str:
    """Ask the user with a form that has every kind of choice."""
    return f"Elicitation completed: {await ask(ctx, 'Please choose', ENUMS)}"


@server.tool()
def test_error_handling() -> str:
    """Fail."""
    raise ToolError("This tool intentionally returns an error for testing")


@server.tool()
async def test_reconnection(ctx: Context) -> str:
    """End the response in mid-call, so that the client has to come back for the result."""
    await ctx.info("Before disconnect")
    await ctx.close_sse_stream()
    await asyncio.sleep(0.1)
    await ctx.info("After reconnect")
    return "Reconnection test completed"


async def ask(ctx: Context, message: str, schema: types.ElicitRequestedSchema) -> str:
    """The user's answer as the suite wants to see it."""
    answer = await ctx.session.elicit_form(message, schema, related_request_id=ctx.request_id)
    return f"action={answer.action}, content={json.dumps(answer.content)}"


def embedded(uri: str, text: str, mime_type: str = "text/plain") -> types.EmbeddedResource:
    """A resource inside a result or a prompt."""
    return types.EmbeddedResource(resource=types.TextResourceContents(uri=uri, text=text, mime_type=mime_type))


# --- resources --------------------------------------------------------------------------------------------------------


@server.resource("test://static-text", mime_type="text/plain")
def static_text() -> str:
    """A text."""
    return "This is the content of the static text resource."


@server.resource("test://static-binary", mime_type="image/png")
def static_binary() -> bytes:
    """An image."""
    return PNG


@server.resource("test://template/{id}/data", mime_type="application/json")
def template(id: str) -> str:
    """A resource of a template."""
    return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})


@server.resource("test://watched-resource", mime_type="text/plain")
def watched_resource() -> str:
    """A resource that can be subscribed to."""
    return "Watched resource content"


# --- prompts ----------------------------------------------------------------------------------------------------------


@server.prompt()
def test_simple_prompt() -> str:
    """A prompt without arguments."""
    return "This is a simple prompt for testing."


@server.prompt()
def test_prompt_with_arguments(arg1: str, arg2: str) -> str:
    """A prompt with two arguments."""
    return f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'"


@server.prompt()
def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:
    """A prompt that carries a resource."""
    return [
        UserMessage(embedded(resourceUri, "Embedded resource content for testing.")),
        UserMessage("Please process the embedded resource above."),
    ]


@server.prompt()
def test_prompt_with_image() -> list[UserMessage]:
    """A prompt that carries an image."""
    return [
        UserMessage(Image(data=PNG, format="png").to_image_content()),
        UserMessage("Please analyze the image above."),
    ]


# --- completion, logging, subscriptions -------------------------------------------------------------------------------


@server.completion()
async def complete(
    ref: types.PromptReference | types.ResourceTemplateReference,
    argument: types.CompletionArgument,
    context: types.CompletionContext | None,
) -> types.Completion:
    """Complete with the values that begin as the argument does."""
    values = [value for value in ("paris", "park", "party", "testing") if value.startswith(argument.value)]
    return types.Completion(values=values, total=len(values), has_more=False)


async def accept(ctx: ServerRequestContext, params: Any) -> types.EmptyResult:
    """Answer a setting of the session's, which needs nothing further here."""
    return types.EmptyResult()


# MCPServer (2.3.0) has no public way to serve these; its own everything-server does the same.
for method, params in (
    ("logging/setLevel", types.SetLevelRequestParams),
    ("resources/subscribe", types.SubscribeRequestParams),
    ("resources/unsubscribe", types.UnsubscribeRequestParams),
):
    server._lowlevel_server.add_request_handler(method, params, accept)


events = MemoryEventStore() if os.environ.get("EVERYTHING_EVENT_IDS") else None
app = server.streamable_http_app(retry_interval=RETRY_INTERVAL, event_store=events)
if (dsn := os.environ.get("MCP_PG_EVENTS_DSN")) and os.environ.get("TEST_DURABLE") != "0":
    from mcp_pg_events import durable

    app = durable(app, dsn)
