"""`mcp-pg-events proxy`: a server that cannot be changed, behind an endpoint that is resumable on every replica.

Everything that can be wrong is checked before the first worker starts, as in `serve`, whose way of giving its plan to
worker processes this shares. Next: `proxied.py`, and uvicorn.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import signal
from typing import Annotated, Any

import typer

from ..embedded import default_home, embedded_postgres
from ..settings import Settings
from .options import Dsn, Host, Level, LivePath, LogLevel, Port, ReadyPath, Schema, Workers
from .proxied import FACTORY, ProgramPlan, ProxyPlan, UpstreamPlan, proxy_extra, variables
from .report import print_checks, tell_verdict
from .running import exit_cleanly, listen, run, shown

__all__ = ["proxy"]

_PROGRAM = "Before a program on stdio"
_UPSTREAM = "Before an upstream over HTTP"
_IDLE_TIMEOUT = 1800.0


def proxy(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- COMMAND...]",
            help="The program that speaks MCP on its standard input and output, and its arguments, after `--`.",
            show_default=False,
        ),
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The MCP endpoint of a server that speaks Streamable HTTP, such as http://host:3000/mcp.",
            show_default=False,
        ),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workers: Workers = 1,
    dsn: Dsn = None,
    schema: Schema = None,
    path: Annotated[str, typer.Option(help="The endpoint's path.")] = "/mcp",
    idle_timeout: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds after which a session that nobody uses ends; 0 for never. Before a program 1800, before an "
            "upstream 0: it ends its own sessions.",
            show_default=False,
        ),
    ] = None,
    live_path: LivePath = "/livez",
    ready_path: ReadyPath = "/readyz",
    log_level: Level = "info",
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=VALUE]",
            help="A variable for the program; without a value one of this environment that it would not get otherwise.",
            show_default=False,
            rich_help_panel=_PROGRAM,
        ),
    ] = None,
    max_processes: Annotated[
        int, typer.Option(min=1, help="How many programs may run in each worker.", rich_help_panel=_PROGRAM)
    ] = 100,
    start_timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds that the program may take to answer initialize.", rich_help_panel=_PROGRAM),
    ] = 60.0,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Only say whether the upstream is there and what it can do. Exit code 0 if it can be served, else 1.",
            rich_help_panel=_UPSTREAM,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what --check finds as JSON.", rich_help_panel=_UPSTREAM)
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="The origin of a page that may use the endpoint from a browser, or * for any. May be repeated.",
            show_default=False,
            rich_help_panel=_UPSTREAM,
        ),
    ] = None,
    ca_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Certificates (PEM) to verify the upstream with, instead of this machine's.",
            show_default=False,
            rich_help_panel=_UPSTREAM,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Do not verify the upstream's certificate.", rich_help_panel=_UPSTREAM),
    ] = False,
    upstream_timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds that the upstream may take to begin an answer. One that answers in JSON begins when its tool "
            "is done.",
            rich_help_panel=_UPSTREAM,
        ),
    ] = 300.0,
    credential_lifetime: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds for which a credential that the upstream took for a session is believed without asking "
            "again.",
            rich_help_panel=_UPSTREAM,
        ),
    ] = 60.0,
    max_message_size: Annotated[
        int, typer.Option(min=1, help="The largest message either way, in bytes.", rich_help_panel=_UPSTREAM)
    ] = 64 * 1024 * 1024,
) -> None:
    """Put a server that cannot be changed behind Streamable HTTP that is resumable on every replica.

    Examples:

        mcp-pg-events proxy -- npx -y @modelcontextprotocol/server-everything

            a program on stdio, one for each session, over a PostgreSQL of its own

        mcp-pg-events proxy --upstream http://127.0.0.1:3000/mcp --port 9000 --dsn postgresql://localhost/app

            a server that speaks HTTP, over your PostgreSQL; run `mcp-pg-events migrate` on it first, and the same
            command on as many machines as you like

        mcp-pg-events proxy --upstream https://mcp.example.com/mcp --check

            what can be expected of it

    A program gets this environment, less MCP_PG_EVENTS_* and libpq's variables; what it writes to its standard error
    is in the log, with its session's id. Whoever reaches the endpoint can have it run: put authentication before it, or
    leave it on the loopback interface.

    An upstream gets every request with the client's own credential, and decides; the proxy has none.

    SIGTERM and Ctrl-C end every worker and every program.
    """
    _one_kind(context, command, upstream)
    if check or as_json:
        if upstream is None or not check:
            raise typer.BadParameter("--check needs --upstream URL, and --json needs --check.")
        _check(upstream, verify=not insecure, ca_file=ca_file, as_json=as_json)
        return
    # Without this a SIGTERM would end the process in the middle, and leave the embedded PostgreSQL running.
    signal.signal(signal.SIGTERM, exit_cleanly)
    settings = Settings.given(dsn=dsn, schema=schema)
    shared: dict[str, Any] = {
        "dsn": settings.database or "",
        "listen_dsn": settings.listen_dsn.get_secret_value() if settings.listen_dsn else None,
        "schema": settings.schema_name,
        "host": host,
        "path": path,
        "live_path": live_path or None,
        "ready_path": ready_path or None,
    }
    plan: ProxyPlan
    if upstream is None:
        plan = ProgramPlan(
            **shared,
            command=command or [],
            env=variables(env or []),
            max_processes=max_processes,
            idle_timeout=(_IDLE_TIMEOUT if idle_timeout is None else idle_timeout) or None,
            start_timeout=start_timeout,
        )
    else:
        plan = UpstreamPlan(
            **shared,
            upstream=upstream,
            verify=not insecure,
            ca_file=ca_file,
            cors_origins=cors_origin or [],
            upstream_timeout=upstream_timeout,
            credential_lifetime=credential_lifetime,
            max_message_size=max_message_size,
            idle_timeout=idle_timeout or None,
        )
    _serve(plan, settings, host, port, workers, log_level)


def _one_kind(context: typer.Context, command: list[str] | None, upstream: str | None) -> None:
    """One of the two, and no option of the other."""
    if (upstream is None) == (not command):
        raise typer.BadParameter("Give either --upstream URL, or a program after `--`.")
    other = _PROGRAM if upstream is not None else _UPSTREAM
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE" and getattr(parameter, "rich_help_panel", None) == other:
            raise typer.BadParameter(f"{parameter.opts[0]} is for a proxy {other[0].lower()}{other[1:]}.")


def _check(url: str, *, verify: bool, ca_file: str | None, as_json: bool) -> None:
    with proxy_extra():
        from ..proxy.check import examine
    found = asyncio.run(examine(url, verify=verify, ca_file=ca_file))
    tell_verdict(found, as_json=as_json)


def _serve(plan: ProxyPlan, settings: Settings, host: str, port: int, workers: int, log_level: LogLevel) -> None:
    # The SDK takes a second, and --help needs none of it.
    from ..store import PostgresStore
    from .application import rehearse

    plan.app()  # whatever it refuses is said before anything is started
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listen(host, port))
        logging.getLogger("alembic").setLevel(logging.WARNING)
        if settings.database is None:
            home = str(default_home())
            made = stack.enter_context(embedded_postgres(home, schema=plan.schema))
            plan = dataclasses.replace(plan, dsn=made, embedded_home=home)
            typer.echo(f"No DSN given: using the embedded PostgreSQL in {home}.", err=True)
        asyncio.run(rehearse(PostgresStore(plan.dsn, listen_dsn=plan.listen_dsn, schema=plan.schema)))
        _examine(plan)
        plan.publish()
        count = "one worker" if workers == 1 else f"{workers} workers"
        typer.echo(
            f"Serving {plan.shown} with {count} at http://{shown(listener)}{plan.path} (Ctrl-C ends it)", err=True
        )
        # A credential may be in the query of a URL.
        run(plan.app(), FACTORY, listener, workers, log_level, access_log=not isinstance(plan, UpstreamPlan))


def _examine(plan: ProxyPlan) -> None:
    """What the doctor finds, and what an upstream says, before anything is served: both may mend themselves later."""
    from ..doctor import examine

    found = [each for each in examine(plan.dsn, schema=plan.schema, listen_dsn=plan.listen_dsn) if each.status != "ok"]
    if isinstance(plan, UpstreamPlan):
        from ..proxy import check

        checked = asyncio.run(check.examine(plan.upstream, verify=plan.verify, ca_file=plan.ca_file))
        found += [each for each in checked if each.status != "ok"]
    print_checks(found, err=True)
