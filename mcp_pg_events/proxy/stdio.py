"""A server that speaks stdio, behind resumable Streamable HTTP: `app = stdio_app(["npx", "-y", "some-server"], dsn)`.

Each session has a process of its own, which lives on the replica that took its `initialize`; every replica takes every
request. The HTTP side is `http.py`, as of `durable`; the process stands in the SDK's place. Next: `stdio_sessions.py`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, Unpack

from mcp.server.transport_security import RequestBodyLimitMiddleware, TransportSecuritySettings
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER, unsupported_protocol_version_rejection
from mcp_types import ErrorData, JSONRPCError
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..health import health_routes
from ..http import EndpointOptions, HTTPEndpoint
from ..reader import ReaderOptions
from ..signals import drain_on_sigterm
from ..store import PostgresStore, StoreOptions, as_store
from ..telemetry import Traced
from .options import check_name, check_paths, check_seconds, check_sizes
from .process import Command
from .stdio_sessions import ProcessSessions

__all__ = ["loopback_security", "stdio_app"]

logger = logging.getLogger(__name__)

MAX_MESSAGE_SIZE: Final = 64 * 1024 * 1024


def stdio_app(
    command: Sequence[str],
    store: PostgresStore | str,
    *,
    path: str = "/mcp",
    live_path: str | None = None,
    ready_path: str | None = None,
    name: str | None = None,
    env: Mapping[str, str] | None = None,
    owner: Callable[[Scope], str | None] | None = None,
    max_processes: int = 100,
    idle_timeout: float | None = 1800.0,
    start_timeout: float = 60.0,
    stop_timeout: float = 2.0,
    max_message_size: int = MAX_MESSAGE_SIZE,
    security: TransportSecuritySettings | None = None,
    keep_alive: float = 15.0,
    poll_interval: float = 5.0,
    retry: int | None = None,
    **store_options: Unpack[StoreOptions],
) -> Starlette:
    """An ASGI app that runs `command` once for each session, and serves it over Streamable HTTP on any replica.

    Args:
        command: The program and its arguments. It gets the environment of this process less what begins with
            `MCP_PG_EVENTS_`, and less libpq's variables (`PGPASSWORD` and the like).
        store: A `PostgresStore`, or the DSN for one of this app's own.
        path: The endpoint's path.
        live_path: Where to answer 200 as long as this process runs; nowhere by default.
        ready_path: Where to say whether this replica should be sent requests; nowhere by default.
        name: Whose sessions these are; made from the command by default, so that replicas agree.
        env: More variables for the program; what is left out of the environment can be put back with them.
        owner: From the ASGI scope to a string that names who asks, or None. A session is served to the one who opened
            it alone.
        max_processes: How many programs may run on this replica; further sessions are refused with 503.
        idle_timeout: After how many seconds without a request, a running call or a connected client a session ends,
            and its program with it; None for never.
        start_timeout: How long (seconds) the program may take to answer `initialize`.
        stop_timeout: How long (seconds) it gets to end when its input is closed, and again after SIGTERM.
        max_message_size: The largest message either way, in bytes.
        security: The SDK's checks of `Host` and `Origin`; none by default.
        keep_alive: Seconds between SSE comments on a quiet response.
        poll_interval: Seconds after which a quiet reader looks into the log by itself, in case a notification was lost.
        retry: The reconnection time that clients are told, in milliseconds.
        store_options: Keyword arguments of `PostgresStore`, where `store` is a DSN.

    Raises:
        ConfigurationError: there is no such program, or an option cannot work.
    """
    check_seconds(
        keep_alive=keep_alive,
        poll_interval=poll_interval,
        start_timeout=start_timeout,
        stop_timeout=stop_timeout,
        idle_timeout=idle_timeout,
    )
    check_sizes(max_processes=max_processes, max_message_size=max_message_size)
    check_name(name)
    check_paths(path, live_path, ready_path)
    checked = Command.checked(command, extra=env or {}, max_message_size=max_message_size, stop_timeout=stop_timeout)
    store = as_store(store, store_options)
    name = name or _name(command)
    options = EndpointOptions(
        name=name,
        owner=owner,
        json_response=False,
        idle_timeout=idle_timeout,
        max_sessions=None,
        security=security,
        reader=ReaderOptions(
            keep_alive=keep_alive, poll_interval=poll_interval, outage_timeout=store.outage_timeout, retry=retry
        ),
    )
    gate = _Gate()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with store:
            sessions = ProcessSessions(
                checked,
                store,
                name=name,
                max_processes=max_processes,
                idle_timeout=idle_timeout,
                start_timeout=start_timeout,
            )
            async with sessions.running():
                with drain_on_sigterm(store):
                    endpoint = HTTPEndpoint(store, sessions, options)
                    gate.endpoint = Traced(RequestBodyLimitMiddleware(endpoint, max_message_size))
                    try:
                        yield
                    finally:
                        await store.leave(sessions.ids)
                        gate.endpoint = None

    routes = health_routes(store, live=live_path, ready=ready_path)
    return Starlette(routes=[*routes, Route(path, endpoint=gate)], lifespan=lifespan)


def loopback_security() -> TransportSecuritySettings:
    """The checks that the SDK's own apps make on the loopback interface: a page in the user's browser must not reach
    what nobody else can."""
    names = ("127.0.0.1:*", "localhost:*", "[::1]:*")
    return TransportSecuritySettings(
        enable_dns_rebinding_protection=True,
        allowed_hosts=list(names),
        allowed_origins=[f"http://{name}" for name in names],
    )


def _name(command: Sequence[str]) -> str:
    """Another one for each command, which may contain secrets and is not shown whole."""
    digest = hashlib.sha256("\0".join(command).encode("utf-8", "surrogateescape")).hexdigest()
    return f"stdio {os.path.basename(command[0])} {digest[:12]}"


class _Gate:
    """The endpoint once the store has started. Revisions without sessions have nothing that a process could belong to,
    and are told which ones are served."""

    def __init__(self) -> None:
        self.endpoint: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version = Request(scope).headers.get(MCP_PROTOCOL_VERSION_HEADER)
        if self.endpoint is None:
            logger.error(
                "The endpoint was asked while its lifespan did not run; pass the app's lifespan on, see durable"
            )
            await _error(500, ErrorData(code=-32603, message="The server's lifespan did not run"))(scope, receive, send)
        elif version is None or version in HANDSHAKE_PROTOCOL_VERSIONS:
            await self.endpoint(scope, receive, send)
        else:
            rejection = unsupported_protocol_version_rejection(version, HANDSHAKE_PROTOCOL_VERSIONS)
            assert rejection is not None
            error = ErrorData(code=rejection.code, message=rejection.message, data=rejection.data)
            await _error(400, error)(scope, receive, send)


def _error(status: int, error: ErrorData) -> Response:
    body = JSONRPCError(jsonrpc="2.0", id=None, error=error).model_dump_json(by_alias=True, exclude_unset=True)
    return Response(body, status_code=status, media_type="application/json")
