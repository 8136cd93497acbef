"""What `serve` runs: the user's server, found by name, made an ASGI app, made durable.

The command checks and builds everything once, to say what is wrong before a socket opens. Each worker process then
builds it again from `Plan`, which travels in the environment: uvicorn starts workers by an import string, and a command
line would show the DSN's password. Next: `durable`, and uvicorn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, cast

import psycopg
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer
from psycopg import sql

from .. import database, durable, errors
from ..schema import NEEDS, check_schema
from ..store import PostgresStore

__all__ = ["Application", "Plan", "application", "check_database", "find", "make_durable"]

VARIABLE = "MCP_PG_EVENTS_SERVE"

Message = MutableMapping[str, Any]
Application = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a worker process has to know."""

    target: str
    dsn: str = dataclasses.field(repr=False)
    listen_dsn: str | None = dataclasses.field(repr=False)
    schema: str
    path: str
    host: str
    embedded_home: str | None = None

    def publish(self) -> None:
        os.environ[VARIABLE] = json.dumps(dataclasses.asdict(self))


def application() -> Application:
    """The app of this worker process (uvicorn's factory), from the plan in the environment."""
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    plan = Plan(**json.loads(os.environ[VARIABLE]))
    app = make_durable(find(plan.target, path=plan.path, host=plan.host), plan)
    return app if plan.embedded_home is None else _using_embedded(app, plan.embedded_home)


def make_durable(app: Application, plan: Plan) -> Application:
    """`app`, with a store of its own."""
    store = PostgresStore(plan.dsn, listen_dsn=plan.listen_dsn, schema=plan.schema)
    return cast(Application, durable(cast(Any, app), store))


def find(target: str, *, path: str, host: str) -> Application:
    """The ASGI app of what `MODULE:OBJECT` names; `path` and `host` are for those that are not an app yet.

    Raises:
        ConfigurationError: it cannot be found, or is nothing that can be served.
    """
    found = load(target)
    if (app := _as_application(found, path, host)) is not None:
        return app
    what = f"{target!r} is of type {type(found).__name__}"
    if _required_arguments(found) == 0:
        try:
            made = cast(Callable[[], object], found)()
        except Exception as error:
            raise errors.ConfigurationError(
                f"The factory {target!r} failed with {type(error).__name__} ({_first_line(error)})."
            ) from error
        if (app := _as_application(made, path, host)) is not None:
            return app
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
        raise errors.ConfigurationError(
            f"Importing the module {module_name!r} failed with {type(error).__name__} ({_first_line(error)})."
        ) from error
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


def check_database(dsn: str, schema: str) -> None:
    """Look at the database once, before the workers do.

    Raises:
        DatabaseUnavailable: it cannot be reached.
        NotMigrated: its schema is missing, or older than this version needs.
    """
    query = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier(check_schema(schema), "alembic_version"))
    try:
        with psycopg.connect(database.normalise_dsn(dsn)) as connection:
            row = connection.execute(query).fetchone()
    except psycopg.errors.UndefinedTable:
        row = None
    except psycopg.Error as error:
        raise database.translate(error) from None
    if row is None:
        raise errors.NotMigrated(
            f"The database has no schema {schema!r} for mcp_pg_events; run `mcp-pg-events migrate`."
        )
    revision = str(row[0])
    if revision < NEEDS:
        raise errors.SchemaTooOld(
            f"The database's schema is at revision {revision} and this version needs {NEEDS}; "
            f"run `mcp-pg-events migrate`."
        )


def _end_with_the_command() -> None:
    """Wait for the command's process to go, and then end as it would have ended this one: nobody else will."""
    if (command := multiprocessing.parent_process()) is not None:
        command.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _using_embedded(app: Application, home: str) -> Application:
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


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
