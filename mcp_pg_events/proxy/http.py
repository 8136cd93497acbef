"""A server that speaks Streamable HTTP, behind a proxy that makes it resumable: `app = proxy_app(url, dsn)`.

Requests of revisions without sessions (2026-07-28 and later) go to the upstream and back as they are. Next:
`endpoint.py` for all others.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final, Unpack
from urllib.parse import urlsplit

import anyio
from mcp.server.transport_security import RequestBodyLimitMiddleware, TransportSecuritySettings
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from mcp_types import INTERNAL_ERROR
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..answers import error_response
from ..errors import ConfigurationError
from ..health import health_routes
from ..reader import ReaderOptions
from ..responses import SESSION_ID
from ..signals import drain_on_sigterm
from ..store import PostgresStore, StoreOptions, as_store
from ..telemetry import Traced
from .admission import Admission
from .credentials import Accepted
from .endpoint import ProxyEndpoint, ProxyOptions
from .options import check_name, check_paths, check_seconds, check_sizes
from .relays import Relays
from .replies import failure
from .upstream import Reply, Upstream, UpstreamFailed, forwarded_headers, returned_headers

__all__ = ["proxy_app"]

logger = logging.getLogger(__name__)

MAX_MESSAGE_SIZE: Final = 64 * 1024 * 1024
EXPOSED: Final = ("Mcp-Session-Id", "MCP-Protocol-Version", "WWW-Authenticate", "Retry-After")
"""What a page may read of an answer: its session above all (Fetch standard, "CORS-safelisted response-header name")."""


def proxy_app(
    upstream: str,
    store: PostgresStore | str,
    *,
    path: str = "/mcp",
    live_path: str | None = None,
    ready_path: str | None = None,
    name: str | None = None,
    verify: bool = True,
    ca_file: str | None = None,
    cors_origins: Sequence[str] = (),
    upstream_timeout: float = 300.0,
    patience: float = 30.0,
    adrift_timeout: float = 300.0,
    credential_lifetime: float = 60.0,
    idle_timeout: float | None = None,
    max_message_size: int = MAX_MESSAGE_SIZE,
    security: TransportSecuritySettings | None = None,
    keep_alive: float = 15.0,
    poll_interval: float = 5.0,
    retry: int | None = None,
    **store_options: Unpack[StoreOptions],
) -> Starlette:
    """An ASGI app that serves the MCP endpoint at the URL `upstream`, resumable on any replica of it.

    Args:
        upstream: The URL of the upstream's MCP endpoint, such as `http://127.0.0.1:3000/mcp`.
        store: A `PostgresStore`, or the DSN for one of this app's own.
        path: The path of this app's own endpoint.
        live_path: Where to answer 200 as long as this process runs; nowhere by default.
        ready_path: Where to say whether this replica should be sent requests; nowhere by default.
        name: Whose sessions these are; made from the URL by default, so that replicas agree.
        verify: Whether the upstream's certificate has to be one that can be verified.
        ca_file: A file of certificates to verify it with; those of the machine by default.
        cors_origins: The origins of the pages that may use the endpoint from a browser; `"*"` is any.
        upstream_timeout: How long (seconds) the upstream may take for the head of an answer. One that answers in JSON
            sends it when its tool is done.
        patience: How long (seconds) an upstream whose connection broke in the middle of a stream is asked to go on,
            and a client that resumes waits for an upstream that does not answer.
        adrift_timeout: How long (seconds) a call waits for its client to come back, once the replica that read it from
            the upstream is gone; then it ends with an error.
        credential_lifetime: For how many seconds a credential that the upstream took for a session is believed without
            asking again.
        idle_timeout: After how many seconds without a request, a running call or a connected client a session ends
            here; None leaves that to the upstream.
        max_message_size: The largest message either way, in bytes.
        security: The SDK's checks of `Host` and `Origin`; none by default.
        keep_alive: Seconds between SSE comments on a quiet response.
        poll_interval: Seconds after which a quiet reader looks into the log by itself, in case a notification was lost.
        retry: The reconnection time that clients are told, in milliseconds.
        store_options: Keyword arguments of `PostgresStore`, where `store` is a DSN.

    Raises:
        ConfigurationError: the URL is none of an HTTP endpoint, or an option cannot work.
    """
    check_seconds(
        keep_alive=keep_alive,
        poll_interval=poll_interval,
        upstream_timeout=upstream_timeout,
        patience=patience,
        adrift_timeout=adrift_timeout,
        credential_lifetime=credential_lifetime,
        idle_timeout=idle_timeout,
    )
    check_sizes(max_message_size=max_message_size)
    check_name(name)
    check_paths(path, live_path, ready_path)
    origins = [_origin(origin) for origin in cors_origins]
    server = Upstream(
        upstream, verify=verify, ca_file=ca_file, timeout=upstream_timeout, max_message_size=max_message_size
    )
    store = as_store(store, store_options)
    name = name or _name(upstream)
    if security is not None and origins:
        security = security.model_copy(update={"allowed_origins": [*security.allowed_origins, *origins]})
    options = ProxyOptions(
        max_message_size=max_message_size,
        security=security,
        reader=ReaderOptions(
            keep_alive=keep_alive, poll_interval=poll_interval, outage_timeout=store.outage_timeout, retry=retry
        ),
    )
    gate = _Gate(server, max_message_size)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with server, store:
            relays = Relays(
                store,
                server,
                name=name,
                idle_timeout=idle_timeout,
                limit=max_message_size,
                patience=patience,
                adrift_timeout=adrift_timeout,
            )
            admission = Admission(
                store,
                server,
                relays,
                Accepted(credential_lifetime),
                name=name,
                idle_timeout=idle_timeout,
                limit=max_message_size,
                patience=patience,
                dropped_origins=frozenset(origins),
            )
            async with relays.running():
                with drain_on_sigterm(store):
                    endpoint = ProxyEndpoint(store, server, relays, admission, options)
                    gate.endpoint = Traced(RequestBodyLimitMiddleware(endpoint, max_message_size))
                    try:
                        yield
                    finally:
                        await store.leave(relays.ids)
                        gate.endpoint = None

    middleware = []
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                allow_credentials="*" not in origins,
                expose_headers=EXPOSED,
            )
        )
    routes = health_routes(store, live=live_path, ready=ready_path)
    return Starlette(routes=[*routes, Route(path, endpoint=gate)], lifespan=lifespan, middleware=middleware)


def _origin(origin: str) -> str:
    """An origin as browsers write it (RFC 6454, 6.1)."""
    if origin == "*":
        return origin
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.netloc or origin != f"{parts.scheme}://{parts.netloc}":
        raise ConfigurationError(f"{origin!r} is no origin such as https://app.example.com")
    return origin.lower()


def _name(url: str) -> str:
    """Another one for each URL, which may contain secrets and is not shown whole."""
    digest = hashlib.sha256(url.encode("utf-8", "surrogateescape")).hexdigest()
    return f"http {urlsplit(url).hostname} {digest[:12]}"


class _Gate:
    """The endpoint once the store has started; what has no session goes past it."""

    def __init__(self, upstream: Upstream, max_message_size: int) -> None:
        self._upstream = upstream
        self._passing = RequestBodyLimitMiddleware(self._pass_through, max_message_size)
        self.endpoint: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        version = Request(scope).headers.get(MCP_PROTOCOL_VERSION_HEADER)
        if self.endpoint is None:
            logger.error(
                "The endpoint was asked while its lifespan did not run; pass the app's lifespan on, see durable"
            )
            error = error_response(500, "The server's lifespan did not run", INTERNAL_ERROR)
            await error(scope, receive, send)
        elif version is None or version in HANDSHAKE_PROTOCOL_VERSIONS:
            await self.endpoint(scope, receive, send)
        else:
            await self._passing(scope, receive, send)

    async def _pass_through(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Unchanged. A client that hangs up cancels its request there too (specification, 2026-07-28)."""
        request = Request(scope, receive)
        try:
            body = await request.body()
        except ClientDisconnect:
            return
        failed: UpstreamFailed | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(_until_disconnected, receive, group.cancel_scope)
            try:
                reply = await self._upstream.request(
                    request.method,
                    forwarded_headers(request),
                    query=scope.get("query_string", b""),
                    body=body or None,
                    extra=[
                        (name, value) for name in ("last-event-id",) if (value := request.headers.get(name)) is not None
                    ],
                    session_id=request.headers.get("mcp-session-id"),
                )
                try:
                    await self._send_on(reply, send)
                finally:
                    reply.close()
            except UpstreamFailed as error:
                failed = error
            group.cancel_scope.cancel()
        if failed is not None:
            logger.warning("A request failed: %s", failed)
            await failure(failed)(scope, receive, send)

    async def _send_on(self, reply: Reply, send: Send) -> None:
        """Raises `UpstreamFailed` only as long as nothing was sent."""
        headers = returned_headers(reply)
        if (length := reply.header("content-length")) is not None:
            headers.append((b"content-length", length.encode("latin-1")))
        if (session_id := reply.header(SESSION_ID)) is not None:
            headers.append((SESSION_ID.encode(), session_id.encode("latin-1")))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        try:
            async for chunk in reply.chunks():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except UpstreamFailed as failed:
            # Its client is to see that it is not whole: the server cuts the connection of a response without an end.
            logger.warning("A response was cut: %s", failed)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _until_disconnected(receive: Receive, scope: anyio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    scope.cancel()
