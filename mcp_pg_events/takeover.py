"""Takes an app's session manager over: `app = durable(mcp.streamable_http_app(), dsn)`.

The gate stands in front of the SDK's session manager from the moment `durable` returns. Handshake-era requests go to
`http.py` once the store has started, and get 500 before; requests of 2026-07-28 and later go on to the SDK as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar, Unpack

from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.transport_security import RequestBodyLimitMiddleware
from mcp.shared.inbound import MCP_PROTOCOL_VERSION_HEADER
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ConfigurationError
from .http import EndpointOptions, HTTPEndpoint
from .reader import ReaderOptions
from .sessions import Sessions
from .signals import drain_on_sigterm
from .store import PostgresStore, StoreOptions, as_store
from .telemetry import Traced

__all__ = ["durable", "endpoint_path", "is_durable", "store_of"]

logger = logging.getLogger(__name__)

App = TypeVar("App", bound=Starlette)

_RECIPE: Final = (
    "The MCP endpoint was asked before its store had started: the app's lifespan did not run. Starlette and FastAPI "
    "do not run the lifespan of a mounted app, so pass it on: `FastAPI(lifespan=mcp_app.router.lifespan_context)`, or "
    "`async with mcp_app.router.lifespan_context(mcp_app): yield` in the outer app's own lifespan; and do not serve "
    "with `--lifespan off`."
)


@dataclass(frozen=True, slots=True)
class _Options:
    name: str | None
    owner: Callable[[Scope], str | None] | None
    keep_alive: float
    poll_interval: float


def durable(
    app: App,
    store: PostgresStore | str,
    *,
    name: str | None = None,
    owner: Callable[[Scope], str | None] | None = None,
    keep_alive: float = 15.0,
    poll_interval: float = 5.0,
    **store_options: Unpack[StoreOptions],
) -> App:
    """Make an MCP app's sessions and streams live in PostgreSQL, so that any worker serves any request of any session.

    Args:
        app: What `MCPServer.streamable_http_app()`, a low-level `Server.streamable_http_app()` or FastMCP's
            `http_app()` returned. Its authentication, limits, routes and options stay as they are.
        store: A `PostgresStore`, which several apps may share, or the DSN for one of this app's own.
        name: Whose sessions these are; the server's name by default. On one database, a session of one name is unknown
            to every other.
        owner: For authentication other than the SDK's bearer tokens: from the ASGI scope to a string that names the
            principal, or None. A session is served to the principal that opened it alone.
        keep_alive: Seconds between SSE comments on a quiet response.
        poll_interval: Seconds after which a quiet reader looks into the log by itself, in case a notification was lost.
        store_options: Keyword arguments of `PostgresStore`, where `store` is a DSN.

    Returns:
        The same app.

    Raises:
        ConfigurationError: there is no Streamable HTTP endpoint in the app, it is stateless, it already has an event
            store or is durable already, or an option cannot work.
    """
    for option, value in (("keep_alive", keep_alive), ("poll_interval", poll_interval)):
        if not 0 < value < 1e9:
            raise ConfigurationError(f"{option} has to be a positive number of seconds")
    if name is not None and (not name or "\0" in name):
        raise ConfigurationError("name has to be a string of at least one character, without NUL")
    store = as_store(store, store_options)
    options = _Options(name, owner, keep_alive, poll_interval)
    _, holder, endpoint = _find_endpoint(app)
    manager = endpoint.session_manager
    if is_durable(app):
        raise ConfigurationError("This app is durable already")
    if manager is None:
        _wrap_lifespan(app, holder, endpoint, store, options)
    else:
        _refuse_unsuitable(manager)
        _wrap_manager(manager, store, options)
    return app


def is_durable(app: object) -> bool:
    """Whether `durable` was called with this app; False also for what has no endpoint."""
    return store_of(app) is not None


def store_of(app: object) -> PostgresStore | None:
    """The store of an app that is durable."""
    try:
        _, _, endpoint = _find_endpoint(app)
    except ConfigurationError:
        return None
    gate = endpoint.gate if isinstance(endpoint, _Front) else getattr(endpoint.session_manager, "asgi_app", None)
    return gate.store if isinstance(gate, _Gate) else None


def endpoint_path(app: object) -> str | None:
    """The path of an app's Streamable HTTP endpoint, below whatever it is mounted at."""
    try:
        path, _, _ = _find_endpoint(app)
    except ConfigurationError:
        return None
    return path


def _find_endpoint(app: object) -> tuple[str, Any, Any]:
    """The ASGI app that has the session manager, a route's endpoint behind whatever authentication wraps it; before it
    whatever has it as its `app`, and the route's path."""
    found: list[tuple[str, Any, Any]] = []
    routes = [("", route) for route in getattr(app, "routes", None) or ()]
    while routes:
        above, route = routes.pop()
        path = above + getattr(route, "path", "")
        routes += [(path, each) for each in getattr(route, "routes", None) or ()]
        holder, candidate = route, getattr(route, "app", None)
        for _ in range(16):
            if candidate is None or hasattr(candidate, "session_manager"):
                break
            holder, candidate = candidate, getattr(candidate, "app", None)
        if candidate is not None and hasattr(candidate, "session_manager"):
            found.append((path, holder, candidate))
    if len({id(endpoint) for _, _, endpoint in found}) != 1:
        raise ConfigurationError(
            f"durable() found {len(found) or 'no'} Streamable HTTP endpoints in the app; give it what one server's "
            "streamable_http_app() or http_app() returned"
        )
    return found[0]


def _refuse_unsuitable(manager: StreamableHTTPSessionManager) -> None:
    if manager.stateless:
        raise ConfigurationError(
            "A stateless app keeps no sessions, so there is nothing to make durable; leave stateless_http out"
        )
    if manager.event_store is not None:
        raise ConfigurationError("The app already has an event store; leave event_store out, durable() takes its place")


class _Gate:
    """In the session manager's place: handshake-era requests to the durable endpoint, all others to the SDK."""

    def __init__(self, modern: ASGIApp, store: PostgresStore) -> None:
        self._modern = modern
        self.store = store
        self.endpoint: ASGIApp | None = None
        self._explained = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        header = MCP_PROTOCOL_VERSION_HEADER.encode("ascii")
        version = next((v.decode("latin-1") for k, v in scope["headers"] if k == header), None)
        if self.endpoint is None:
            if not self._explained:
                logger.error(_RECIPE)
                self._explained = True
            await _not_started(scope, receive, send)
        elif version is None or version in HANDSHAKE_PROTOCOL_VERSIONS:
            await self.endpoint(scope, receive, send)
        else:
            await self._modern(scope, receive, send)


class _Front:
    """Before FastMCP's endpoint, which each lifespan gives a new session manager: no lifespan reaches this gate but
    `durable`'s own."""

    def __init__(self, endpoint: Any, gate: _Gate) -> None:
        self._endpoint = endpoint
        self.gate = gate

    @property
    def session_manager(self) -> Any:
        return self._endpoint.session_manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.gate(scope, receive, send)


async def _not_started(scope: Scope, receive: Receive, send: Send) -> None:
    error = {"code": -32603, "message": "The server's lifespan did not run; its log says what to do"}
    await JSONResponse({"jsonrpc": "2.0", "id": None, "error": error}, status_code=500)(scope, receive, send)


def _wrap_manager(manager: StreamableHTTPSessionManager, store: PostgresStore, options: _Options) -> None:
    """The SDK's own apps: the manager exists, and its `run()` is what every lifespan enters, also a mounted app's."""
    gate = _Gate(manager.asgi_app, store)
    original: Callable[[], AbstractAsyncContextManager[None]] = manager.run

    @asynccontextmanager
    async def run() -> AsyncIterator[None]:
        async with store, original(), _serving(manager, gate, store, options):
            yield

    manager.asgi_app = gate  # type: ignore[assignment]  # declared by what the SDK happens to put there: an ASGI app
    manager.run = run  # type: ignore[method-assign]  # the instance's; the class stays as it is


def _wrap_lifespan(app: Starlette, holder: Any, endpoint: Any, store: PostgresStore, options: _Options) -> None:
    """FastMCP's apps: the session manager is made in the lifespan."""
    gate = _Gate(endpoint, store)
    holder.app = _Front(endpoint, gate)
    original = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(running: Any) -> AsyncIterator[Any]:
        async with store, original(running) as state:
            manager = endpoint.session_manager
            if manager is None:
                # The app was mounted in this one, and nobody runs its lifespan: the gate stays shut.
                yield state
                return
            _refuse_unsuitable(manager)
            async with _serving(manager, gate, store, options):
                yield state

    app.router.lifespan_context = lifespan


@asynccontextmanager
async def _serving(
    manager: StreamableHTTPSessionManager, gate: _Gate, store: PostgresStore, options: _Options
) -> AsyncIterator[None]:
    """Between the server's lifespan and the requests: the sessions, and the endpoint in the gate."""
    name = options.name or manager.app.name
    if store.retention is not None and store.retention.total_seconds() < (manager.session_idle_timeout or math.inf):
        logger.warning(
            "Events are kept for %s, and sessions may be idle for longer (session_idle_timeout): a client that comes "
            "back then finds that what it missed has expired",
            store.retention,
        )
    sessions = Sessions(
        manager.app,
        # The state that the server's lifespan yielded: the one private name that is read of the SDK.
        manager._lifespan_state,
        store,
        name=name,
        json_response=manager.json_response,
        idle_timeout=manager.session_idle_timeout,
    )
    endpoint = HTTPEndpoint(
        store,
        sessions,
        EndpointOptions(
            name=name,
            owner=options.owner,
            json_response=manager.json_response,
            idle_timeout=manager.session_idle_timeout,
            max_sessions=manager.max_sessions,
            security=manager.security_settings,
            reader=ReaderOptions(
                keep_alive=options.keep_alive,
                poll_interval=options.poll_interval,
                outage_timeout=store.outage_timeout,
                retry=manager.retry_interval,
            ),
        ),
    )
    async with sessions.running():
        with drain_on_sigterm(store):
            gate.endpoint = Traced(RequestBodyLimitMiddleware(endpoint, manager.max_request_body_size))
            try:
                yield
            finally:
                # Requests that still come, on connections kept alive, are answered while calls finish.
                await store.leave(sessions.ids)
                gate.endpoint = None
