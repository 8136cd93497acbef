"""What the endpoints of `http.py` and of the proxy ask of every request, and where it goes on. Next: `_post` and the
others there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from mcp.server.streamable_http import check_accept_headers
from mcp.server.transport_security import TransportSecurityMiddleware
from mcp_types import JSONRPCMessage
from starlette.requests import Request

from . import telemetry
from .answers import Answer, error_response, parse

__all__ = ["read_message", "route"]

Handler = Callable[[], Awaitable[None]]


async def route(
    request: Request, security: TransportSecurityMiddleware, *, post: Handler, get: Handler, delete: Handler
) -> None:
    """Have a request handled by its method. Raises `Answer` for one of another host, origin or method, and for a GET
    that takes no stream."""
    refusal = await security.validate_request(request, is_post=request.method == "POST")
    if refusal is not None:
        raise Answer(refusal)
    match request.method:
        case "POST":
            await post()
        case "GET":
            if not check_accept_headers(request)[1]:
                raise Answer(error_response(406, "Not Acceptable: Client must accept text/event-stream"))
            await get()
        case "DELETE":
            await delete()
        case _:
            raise Answer(error_response(405, "Method Not Allowed", headers={"Allow": "GET, POST, DELETE"}))


async def read_message(request: Request, *, json_response: bool = False) -> tuple[JSONRPCMessage, bytes]:
    """The message of a POST, and its bytes. Raises `Answer` where its client does not take what comes back
    (`json_response`: never a stream), and where it is no message."""
    has_json, has_sse = check_accept_headers(request)
    if not (has_json and (has_sse or json_response)):
        kinds = "application/json" if json_response else "both application/json and text/event-stream"
        raise Answer(error_response(406, f"Not Acceptable: Client must accept {kinds}"))
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Answer(error_response(415, "Unsupported Media Type: Content-Type must be application/json"))
    body = await request.body()
    message = parse(body)
    telemetry.received(request.scope, message)
    return message, body
