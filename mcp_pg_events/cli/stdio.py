"""`mcp-pg-events proxy -- COMMAND`: a program that speaks stdio, behind resumable Streamable HTTP.

Everything that can be wrong is checked before the first worker starts, as in `serve`, whose way of giving its plan to
worker processes this shares. Next: `proxy/stdio.py`, and uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import shlex
import signal
import sys
import threading
from typing import TYPE_CHECKING, Annotated

import typer

from ..embedded import default_home, embedded_postgres
from ..errors import ConfigurationError, Error
from ..settings import Settings
from .options import Dsn, Host, Level, LivePath, Port, ReadyPath, Schema, Workers
from .running import exit_cleanly, listen, run, shown

if TYPE_CHECKING:
    from .application import Application

__all__ = ["application", "proxy"]

VARIABLE = "MCP_PG_EVENTS_PROXY"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Everything a worker process has to know."""

    command: list[str]
    env: dict[str, str] = dataclasses.field(repr=False)
    dsn: str = dataclasses.field(repr=False)
    listen_dsn: str | None = dataclasses.field(repr=False)
    schema: str
    host: str
    path: str
    live_path: str | None
    ready_path: str | None
    max_processes: int
    idle_timeout: float | None
    start_timeout: float
    embedded_home: str | None = None


def proxy(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND...",
            help="The program that speaks MCP on its standard input and output, and its arguments, after `--`.",
            show_default=False,
        ),
    ],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workers: Workers = 1,
    dsn: Dsn = None,
    schema: Schema = None,
    path: Annotated[str, typer.Option(help="The endpoint's path.")] = "/mcp",
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="A variable for the program; without a value one of this environment that it would not get otherwise.",
            show_default=False,
        ),
    ] = None,
    max_processes: Annotated[int, typer.Option(min=1, help="How many programs may run in each worker.")] = 100,
    idle_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds after which a session that nobody uses ends; 0 for never.")
    ] = 1800.0,
    start_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that the program may take to answer initialize.")
    ] = 60.0,
    live_path: LivePath = "/livez",
    ready_path: ReadyPath = "/readyz",
    log_level: Level = "info",
) -> None:
    """Put a server that speaks stdio behind Streamable HTTP, resumable on every replica.

    Examples:

        mcp-pg-events proxy -- npx -y @modelcontextprotocol/server-everything

            one program for each session, over a PostgreSQL of its own

        mcp-pg-events proxy --port 9000 --dsn postgresql://localhost/app -- uvx some-server --verbose

            over yours; run `mcp-pg-events migrate` on it first, and the same command on as many machines as you like

    The program gets this environment, less MCP_PG_EVENTS_* and libpq's variables. What it writes to its standard error
    is in the log, with its session's id.

    Whoever reaches the endpoint can have the program run: put authentication before it, or leave it on the loopback
    interface. SIGTERM and Ctrl-C end every worker and every program.
    """
    # Without this a SIGTERM would end the process in the middle, and leave the embedded PostgreSQL running.
    signal.signal(signal.SIGTERM, exit_cleanly)
    # The SDK takes a second, and --help needs none of it.
    from ..store import PostgresStore
    from .application import rehearse

    settings = Settings.given(dsn=dsn, schema=schema)
    name = settings.schema_name
    plan = _Plan(
        command=command,
        env=_variables(env or []),
        dsn=settings.database or "",
        listen_dsn=settings.listen_dsn.get_secret_value() if settings.listen_dsn else None,
        schema=name,
        host=host,
        path=path,
        live_path=live_path or None,
        ready_path=ready_path or None,
        max_processes=max_processes,
        idle_timeout=idle_timeout or None,
        start_timeout=start_timeout,
    )
    _make_app(plan)  # whatever it refuses is said before anything is started
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        logging.getLogger("alembic").setLevel(logging.WARNING)
        if settings.database is None:
            home = str(default_home())
            made = stack.enter_context(embedded_postgres(home, schema=name))
            plan = dataclasses.replace(plan, dsn=made, embedded_home=home)
            typer.echo(f"No DSN given: using the embedded PostgreSQL in {home}.", err=True)
        asyncio.run(rehearse(PostgresStore(plan.dsn, listen_dsn=plan.listen_dsn, schema=name)))
        os.environ[VARIABLE] = json.dumps(dataclasses.asdict(plan))
        count = "one worker" if workers == 1 else f"{workers} workers"
        typer.echo(
            f"Serving {shlex.quote(command[0])} with {count} at http://{shown(listener)}{path} (Ctrl-C ends it)",
            err=True,
        )
        run(_make_app(plan), "mcp_pg_events.cli.stdio:application", listener, workers, log_level)


def application() -> Application:
    """The app of this worker process (uvicorn's factory), from the plan in the environment."""
    from uvicorn.config import STARTUP_FAILURE

    from .application import end_with_the_command, using_embedded
    from .report import explain

    threading.Thread(target=end_with_the_command, daemon=True).start()
    plan = _Plan(**json.loads(os.environ[VARIABLE]))
    try:
        app = _make_app(plan)
        return app if plan.embedded_home is None else using_embedded(app, plan.embedded_home)
    except Error as error:
        # Any other way to end, and uvicorn starts the worker again, for ever.
        print(explain(error), file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


def _make_app(plan: _Plan) -> Application:
    from ..proxy.stdio import loopback_security, stdio_app

    return stdio_app(
        plan.command,
        plan.dsn,
        path=plan.path,
        live_path=plan.live_path,
        ready_path=plan.ready_path,
        env=plan.env,
        max_processes=plan.max_processes,
        idle_timeout=plan.idle_timeout,
        start_timeout=plan.start_timeout,
        security=loopback_security() if plan.host in _LOOPBACK else None,
        listen_dsn=plan.listen_dsn,
        schema=plan.schema,
    )


def _variables(given: list[str]) -> dict[str, str]:
    variables = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals and name not in os.environ:
            raise ConfigurationError(f"There is no variable {name!r} in this environment; give --env {name}=VALUE.")
        if not name:
            raise ConfigurationError(f"{each!r} is no NAME or NAME=VALUE.")
        variables[name] = value if equals else os.environ[name]
    return variables
