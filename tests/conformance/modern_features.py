"""What the conformance suite asks of a server of the 2026-07-28 revision, which `durable` leaves to the SDK.

Mostly questions to the client: in that revision a server returns what it needs to know, and the client calls again with
the answers and the server's state. Next: `everything_server.py` registers all this.
"""

# No `from __future__ import annotations`: the SDK reads the annotations of tools.

import json
from typing import Annotated, Any

import mcp_types as types
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.prompts.base import Prompt
from mcp.shared.exceptions import MCPError
from pydantic import Field

Answer = str | types.InputRequiredResult


def form(message: str, **fields: str) -> types.ElicitRequest:
    """A question to the user; each field's value is its JSON type."""
    schema = {
        "type": "object",
        "properties": {name: {"type": kind} for name, kind in fields.items()},
        "required": list(fields),
    }
    return types.ElicitRequest(params=types.ElicitRequestFormParams(message=message, requested_schema=schema))


def sampling(text: str) -> types.CreateMessageRequest:
    """A question to the client's model."""
    message = types.SamplingMessage(role="user", content=types.TextContent(text=text))
    return types.CreateMessageRequest(params=types.CreateMessageRequestParams(messages=[message], max_tokens=100))


def needs(state: str | None = None, **requests: Any) -> types.InputRequiredResult:
    """The result that asks for more."""
    return types.InputRequiredResult(input_requests=requests, request_state=state)


def filled_in(ctx: Context, key: str, field: str) -> Any:
    """What the user put into a field of the form `key`; None without a usable answer."""
    answer = (ctx.input_responses or {}).get(key)
    return (answer.content or {}).get(field) if isinstance(answer, types.ElicitResult) else None


def register(server: MCPServer) -> None:
    """Give `server` all of it."""
    _register_questions(server)
    _register_state(server)
    _register_probes(server)


def _register_questions(server: MCPServer) -> None:
    @server.tool()
    async def test_input_required_result_elicitation(ctx: Context) -> Answer:
        """Ask the user for a name."""
        name = filled_in(ctx, "user_name", "name")
        return needs(user_name=form("What is your name?", name="string")) if name is None else f"Hello, {name}!"

    @server.tool()
    async def test_input_required_result_sampling(ctx: Context) -> Answer:
        """Ask the client's model."""
        answer = (ctx.input_responses or {}).get("capital_question")
        if isinstance(answer, types.CreateMessageResult) and isinstance(answer.content, types.TextContent):
            return f"The model said: {answer.content.text}"
        return needs(capital_question=sampling("What is the capital of France?"))

    @server.tool()
    async def test_input_required_result_list_roots(ctx: Context) -> Answer:
        """Ask the client for its roots."""
        answer = (ctx.input_responses or {}).get("client_roots")
        if isinstance(answer, types.ListRootsResult):
            return "Roots: " + ", ".join(str(root.uri) for root in answer.roots)
        return needs(client_roots=types.ListRootsRequest())

    @server.tool()
    async def test_input_required_result_multiple_inputs(ctx: Context) -> Answer:
        """Ask three things at once."""
        requests = {
            "user_name": form("What is your name?", name="string"),
            "greeting": sampling("Generate a greeting"),
            "client_roots": types.ListRootsRequest(),
        }
        if requests.keys() <= (ctx.input_responses or {}).keys():
            return "All three were answered."
        return needs("asked three things", **requests)

    @server.tool()
    async def test_input_required_result_capabilities(ctx: Context) -> Answer:
        """Ask only what the client said that it can answer."""
        able = ctx.client_capabilities or types.ClientCapabilities()
        requests: dict[str, Any] = {}
        if able.sampling is not None:
            requests["greeting"] = sampling("Generate a greeting")
        if able.elicitation is not None:
            requests["user_name"] = form("What is your name?", name="string")
        return needs("asked what it may", **requests)

    @server.tool()
    async def test_streaming_elicitation(ctx: Context) -> Answer:
        """Report progress, then ask the user."""
        await ctx.report_progress(1, 2, "about to ask")
        ok = filled_in(ctx, "confirm", "ok")
        return needs(confirm=form("Go on?", ok="boolean")) if ok is None else f"ok={ok}"

    @server.prompt()
    async def test_input_required_result_prompt(ctx: Context) -> Answer:
        """A prompt that asks the user first."""
        context = filled_in(ctx, "user_context", "context")
        if context is None:
            return needs(user_context=form("What context should the prompt use?", context="string"))
        return f"Use this context: {context}"


def _register_state(server: MCPServer) -> None:
    @server.tool()
    async def test_input_required_result_request_state(ctx: Context) -> Answer:
        """Ask, and want the state back with the answer."""
        if ctx.request_state == "confirming" and filled_in(ctx, "confirm", "ok") is not None:
            return "state-ok"
        return needs("confirming", confirm=form("Please confirm", ok="boolean"))

    @server.tool()
    async def test_input_required_result_tampered_state(ctx: Context) -> Answer:
        """Ask with a state; the SDK refuses one that was changed before this function is called."""
        if ctx.request_state == "untouched":
            return "state-ok"
        return needs("untouched", confirm=form("Please confirm", ok="boolean"))

    @server.tool()
    async def test_input_required_result_multi_round(ctx: Context) -> Answer:
        """Ask for a name, then for a colour."""
        state = json.loads(ctx.request_state or "{}")
        name = state.get("name", filled_in(ctx, "step1", "name"))
        if name is None:
            return needs(json.dumps({"asked": "name"}), step1=form("Step 1: What is your name?", name="string"))
        color = filled_in(ctx, "step2", "color")
        if color is None:
            return needs(json.dumps({"name": name}), step2=form("Step 2: What is your favorite color?", color="string"))
        return f"{name} likes {color}."


def _register_probes(server: MCPServer) -> None:
    @server.tool()
    async def test_missing_capability(ctx: Context) -> str:
        """Refuse a client that has no sampling."""
        if ctx.client_capabilities is None or ctx.client_capabilities.sampling is None:
            raise MCPError(
                types.MISSING_REQUIRED_CLIENT_CAPABILITY,
                "This tool needs a client with sampling",
                {"requiredCapabilities": {"sampling": {}}},
            )
        return "The client has sampling."

    @server.tool()
    async def test_logging_tool(ctx: Context) -> str:
        """Log something, which is for clients that asked for it."""
        await ctx.info("A log entry")
        return "logged"

    @server.tool()
    async def test_x_mcp_header(
        region: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Region"})] = "none",
    ) -> str:
        """Have an argument that the client repeats in a header."""
        return f"region={region}"

    @server.tool()
    async def test_trigger_tool_change(ctx: Context) -> str:
        """Change the list of tools for a moment, and tell whoever listens."""
        server.add_tool(_nothing, name="test_passing_tool")
        server.remove_tool("test_passing_tool")
        await ctx.notify_tools_changed()
        return "changed"

    @server.tool()
    async def test_trigger_prompt_change(ctx: Context) -> str:
        """Change the list of prompts for a moment, and tell whoever listens."""
        server.add_prompt(Prompt.from_function(_nothing, name="test_passing_prompt"))
        server.remove_prompt("test_passing_prompt")
        await ctx.notify_prompts_changed()
        return "changed"


def _nothing() -> str:
    """Exist for a moment."""
    return ""
