"""What `serve` runs: the user's server, found by name, made an ASGI app, made durable.

The command checks and builds everything once, to say what is wrong before a socket opens. Each worker process then
builds it again from `Plan`, which travels in the environment: uvicorn starts workers by an import string, and a command
line would show the DSN's password. Next: `durable`, and uvicorn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import inspect
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import timedelta
from typing import Any, cast

from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer
from uvicorn.config import STARTUP_FAILURE

from .. import durable, errors
from ..health import check_paths, health_routes
from ..store import PostgresStore
from ..takeover import endpoint_path, store_of
from .report import explain

__all__ = [
    "Application",
    "Plan",
    "application",
    "check_health_paths",
    "end_with_the_command",
    "find",
    "make_durable",
    "make_store",
    "rehearse",
    "store_of",
    "using_embedded",
    "with_health",
]

VARIABLE = "MCP_PG_EVENTS_SERVE"

_LOADING = ("exec_module", "get_code", "source_to_code", "load_module", "create_module")
"""What the loaders of modules are asked for (`importlib.abc`)."""

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a worker process has to know."""

    target: str
    dsn: str | None = dataclasses.field(repr=False)
    """None for an app that is durable already, and has a store."""
    listen_dsn: str | None = dataclasses.field(repr=False)
    schema: str
    path: str
    host: str
    live_path: str | None = None
    ready_path: str | None = None
    embedded_home: str | None = None
    retention: float | None = None
    """In seconds."""

    def publish(self) -> None:
        os.environ[VARIABLE] = json.dumps(dataclasses.asdict(self))


def application() -> Application:
    """The app of this worker process (uvicorn's factory), from the plan in the environment."""
    threading.Thread(target=end_with_the_command, daemon=True).start()
    plan = Plan(**json.loads(os.environ[VARIABLE]))
    try:
        app, _ = find(plan.target, path=plan.path, host=plan.host)
        if plan.dsn is not None:
            app = make_durable(app, plan)
        app = with_health(app, plan)
        return app if plan.embedded_home is None else using_embedded(app, plan.embedded_home)
    except errors.Error as error:
        # Any other way to end, and uvicorn starts the worker again, for ever.
        print(explain(error), file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def make_durable(app: Application, plan: Plan) -> Application:
    """`app`, with a store of its own."""
    return cast(Application, durable(cast(Any, app), make_store(plan)))


def check_health_paths(app: Application, live: str | None, ready: str | None) -> None:
    """Raise `ConfigurationError` for paths that cannot work, or that the app has a route of its own for."""
    check_paths(live, ready)
    for path in {getattr(route, "path", None) for route in getattr(app, "routes", ())} & {live, ready} - {None}:
        option = "--live-path" if path == live else "--ready-path"
        raise errors.ConfigurationError(
            f"The app has a route {path} of its own; give {option} another path, or an empty one to leave it out."
        )


def with_health(app: Application, plan: Plan) -> Application:
    """`app` behind the live and the ready route: outside whatever authentication it has."""
    store = store_of(app)
    assert store is not None
    routes = {route.path: route.handle for route in health_routes(store, live=plan.live_path, ready=plan.ready_path)}
    settle()

    async def behind(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        handle = routes.get(scope["path"]) if scope["type"] == "http" else None
        await (app if handle is None else handle)(scope, receive, send)

    return behind if routes else app


def settle() -> None:
    """All is imported and made: the garbage collector leaves it alone from here on. A full collection holds up every
    stream of the worker, and most of what it would look through is code."""
    gc.collect()
    gc.freeze()


async def rehearse(store: PostgresStore) -> None:
    """Be a worker for a moment, so that what is wrong with the database is said once, and in one sentence.

    Raises:
        Error: what a worker would fail with.
    """
    log = logging.getLogger("mcp_pg_events")
    level = log.level
    log.setLevel(logging.WARNING)  # this worker serves nothing that anybody should hear of
    try:
        async with store:
            pass
    finally:
        log.setLevel(level)


def make_store(plan: Plan) -> PostgresStore:
    """A store for what the plan says."""
    assert plan.dsn is not None
    ttl = None if plan.retention is None else timedelta(seconds=plan.retention)
    return PostgresStore(plan.dsn, listen_dsn=plan.listen_dsn, schema=plan.schema, retention=ttl)


def find(target: str, *, path: str, host: str) -> tuple[Application, str]:
    """The ASGI app of what `MODULE:OBJECT` names, and the path to tell people.

    `path` and `host` are for what is not an app yet; an app has its own.

    Raises:
        ConfigurationError: it cannot be found, or is nothing that can be served.
    """
    found = load(target)
    if (app := _as_application(found, path, host)) is not None:
        return app, endpoint_path(app) or "/"
    what = f"{target!r} is of type {type(found).__name__}"
    if _required_arguments(found) == 0:
        try:
            made = cast(Callable[[], object], found)()
        except Exception as error:
            raise _broken(f"The factory {target!r} failed", error) from error
        if (app := _as_application(made, path, host)) is not None:
            return app, endpoint_path(app) or "/"
        what = f"The factory {target!r} returned something of type {type(made).__name__}"
    raise errors.ConfigurationError(
        f"{what}, which is no MCPServer, low-level Server, FastMCP, ASGI app, or function without arguments that "
        f"returns one of them."
    )


def load(target: str) -> object:
    """The object that `MODULE:OBJECT` names. The working directory is importable, as with uvicorn.

    Raises:
        ConfigurationError: there is no such module or object, or the module fails to import.
    """
    module_name, _, path = target.partition(":")
    if not module_name or not path:
        raise errors.ConfigurationError(f"{target!r} is not MODULE:OBJECT; for `mcp` in weather.py write weather:mcp.")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise errors.ConfigurationError(
                f"There is no module {error.name!r} in {os.getcwd()} or among the installed packages."
            ) from None
        raise errors.ConfigurationError(
            f"The module {module_name!r} imports {error.name!r}, which is not installed."
        ) from error
    except Exception as error:
        raise _broken(f"Importing the module {module_name!r} failed", error) from error
    for name in path.split("."):
        try:
            found = getattr(found, name)
        except AttributeError:
            raise errors.ConfigurationError(f"The module {module_name!r} has no {path!r}.") from None
    return found


def _as_application(found: object, path: str, host: str) -> Application | None:
    if isinstance(found, MCPServer | Server):
        return cast(Application, found.streamable_http_app(streamable_http_path=path, host=host))
    if _is_fastmcp(found):
        return cast(Application, cast(Any, found).http_app(path=path))
    if _required_arguments(found) == 3 and not inspect.isclass(found):
        return cast(Application, found)
    return None


def _is_fastmcp(found: object) -> bool:
    # Not imported unless the user's module did: it is no dependency, and takes a second.
    fastmcp = sys.modules.get("fastmcp")
    return fastmcp is not None and isinstance(found, fastmcp.FastMCP)


def _required_arguments(found: object) -> int | None:
    """How many positional arguments `found` cannot be called without; None when it cannot be called."""
    if not callable(found):
        return None
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    return sum(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
        for parameter in parameters
    )


def end_with_the_command() -> None:
    """Wait for the command's process to go, and then end as it would have ended this one: nobody else will."""
    if (command := multiprocessing.parent_process()) is not None:
        command.join()
        os.kill(os.getpid(), signal.SIGTERM)


def using_embedded(app: Application, home: str) -> Application:
    """`app`, which keeps the embedded PostgreSQL running for as long as it does.

    The command holds it too; when the command is killed, its workers still need their database to end in good order,
    and the last of them stops it. Released at the end of the lifespan, because uvicorn ends a worker by the signal that
    it got, and no `finally` or `atexit` runs after that.
    """
    from ..embedded import embedded_postgres

    stack = contextlib.ExitStack()
    stack.enter_context(embedded_postgres(home, schema=None))

    async def with_embedded(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        try:
            await app(scope, receive, send)
        finally:
            if scope["type"] == "lifespan":
                stack.close()

    return with_embedded


def _broken(what: str, error: Exception) -> errors.ConfigurationError:
    """The user's own code raised `error`: a sentence, and a note with where, without this module's frames."""
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    sentence = errors.ConfigurationError(f"{what} with {type(error).__name__} ({first_line}).")
    told = traceback.TracebackException.from_exception(error)
    ours = (__file__, importlib.__file__)
    frames = [frame for frame in told.stack if frame.filename not in ours and "<frozen importlib" not in frame.filename]
    # A library may have a loader of its own for all modules, whose frames come before the user's.
    while frames and frames[0].name in _LOADING:
        del frames[0]
    told.stack = traceback.StackSummary.from_list(frames)
    sentence.add_note("".join(told.format()).rstrip())
    return sentence
