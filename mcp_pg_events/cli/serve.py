"""`mcp-pg-events serve`: a durable MCP server on one or more worker processes.

Everything that can be wrong is checked before the first worker starts. Next: `application`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from datetime import timedelta
from typing import Annotated

import typer

from ..embedded import default_home, embedded_postgres
from ..errors import ConfigurationError
from ..settings import Settings
from .options import Dsn, Host, Level, LivePath, Port, ReadyPath, Schema, Workers
from .retention import parse_duration
from .running import exit_cleanly, listen, run, shown

__all__ = ["serve"]


def serve(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:OBJECT",
            help="An MCPServer, a low-level Server, a FastMCP, an ASGI app, or a function without arguments that "
            "returns one. The working directory is importable.",
            show_default=False,
        ),
    ],
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workers: Workers = 1,
    dsn: Dsn = None,
    schema: Schema = None,
    path: Annotated[str, typer.Option(help="The endpoint's path. An ASGI app has its own.")] = "/mcp",
    live_path: LivePath = "/livez",
    ready_path: ReadyPath = "/readyz",
    retention: Annotated[
        timedelta | None,
        typer.Option(
            metavar="SPAN",
            parser=parse_duration,
            help="How long an event is kept at least, such as 7d: one of the workers removes older ones. Without it "
            "the log grows, and `mcp-pg-events retention` is for cron.",
            show_default=False,
        ),
    ] = None,
    log_level: Level = "info",
) -> None:
    """Serve an MCP server whose sessions and streams outlive connections, workers and restarts.

    Examples:

        mcp-pg-events serve weather:mcp

            the `mcp` in ./weather.py, over a PostgreSQL of its own

        mcp-pg-events serve weather:mcp --workers 4 --dsn postgresql://localhost/app

            four workers over yours; run `mcp-pg-events migrate` on it first

        mcp-pg-events serve weather.http:create_app --host 0.0.0.0 --port 80

            a function that builds the app, reachable from everywhere

    Without a DSN, and with the `embedded` extra, a PostgreSQL of its own runs in your data directory (or in
    MCP_PG_EVENTS_HOME) for as long as a worker does. An app that is durable already is served as it is, with its own
    store.

    SIGTERM and Ctrl-C end every worker; SIGHUP replaces several one by one. MCP_PG_EVENTS_LISTEN_DSN is a direct
    connection for LISTEN, where the DSN leads to a pooler.
    """
    if not path.startswith("/"):
        raise ConfigurationError(f"The path {path!r} has to begin with a slash.")
    # Without this a SIGTERM would end the process in the middle, and leave the embedded PostgreSQL running.
    signal.signal(signal.SIGTERM, exit_cleanly)
    # The SDK takes a second, and --help needs none of it.
    from .application import (
        Plan,
        check_health_paths,
        find,
        make_durable,
        make_store,
        rehearse,
        store_of,
        with_health,
    )

    settings = Settings.given(dsn=dsn, schema=schema)
    name = settings.schema_name
    with contextlib.ExitStack() as stack:
        app, shown_path = find(target, path=path, host=host)
        check_health_paths(app, live_path or None, ready_path or None)
        listener = stack.enter_context(listen(host, port))
        database, home = settings.database, None
        logging.getLogger("alembic").setLevel(logging.WARNING)  # an MCPServer sends everybody's INFO to the terminal
        if (own := store_of(app)) is not None:
            if dsn is not None or schema is not None or retention is not None:
                raise ConfigurationError(
                    f"{target!r} is durable already, with a store of its own: leave --dsn, --schema and --retention "
                    "out, or name the server that it is made from."
                )
            database = None
        elif database is None:
            home = str(default_home())
            database = stack.enter_context(embedded_postgres(home, schema=name))
            typer.echo(f"No DSN given: using the embedded PostgreSQL in {home}.", err=True)
        listen_dsn = settings.listen_dsn.get_secret_value() if settings.listen_dsn else None
        plan = Plan(
            target=target,
            dsn=database,
            listen_dsn=listen_dsn,
            schema=name,
            path=path,
            host=host,
            live_path=live_path or None,
            ready_path=ready_path or None,
            embedded_home=home,
            retention=None if retention is None else retention.total_seconds(),
        )
        asyncio.run(rehearse(make_store(plan) if own is None else own))
        if own is not None:
            typer.echo(f"{target} is durable already, and is served with its own store.", err=True)
        else:
            app = make_durable(app, plan)  # for one worker; and whatever it refuses is said here, once
        app = with_health(app, plan)
        plan.publish()
        count = "one worker" if workers == 1 else f"{workers} workers"
        typer.echo(f"Serving {target} with {count} at http://{shown(listener)}{shown_path} (Ctrl-C ends it)", err=True)
        run(app, "mcp_pg_events.cli.application:application", listener, workers, log_level)
