"""The command line: `mcp-pg-events`, or `python -m mcp_pg_events`.

Each command is a module of its own, which reads its options, asks `settings.py` for what they leave out, and calls the
library. What goes wrong ends as one sentence on stderr: exit code 2 for the command line itself, 1 for all else.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer

from mcp_pg_events.cli import demo, doctor, migrate, proxy, retention, serve, sessions, stats, tail, terminal, transfer
from mcp_pg_events.cli.report import explain
from mcp_pg_events.errors import Error

__all__ = ["app", "main"]

app = typer.Typer(
    name="mcp-pg-events",
    help="MCP sessions over PostgreSQL: any worker serves any request, and a dropped stream resumes on another one.",
    epilog="Start with `mcp-pg-events demo`. The database is given by --dsn or MCP_PG_EVENTS_DSN.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"mcp-pg-events {version('mcp-pg-events')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(migrate.migrate)
app.command()(serve.serve)
app.command(context_settings={"allow_interspersed_args": False})(proxy.proxy)
app.command()(demo.demo)
app.command()(retention.retention)
app.command()(doctor.doctor)
app.add_typer(sessions.app, name="sessions")
app.command()(stats.stats)
app.command()(tail.tail)
app.command()(transfer.export)
app.command("import")(transfer.import_)


def main() -> None:
    """Run the command line and exit."""
    code: str | int | None = 0
    try:
        app()
    except Error as error:
        print(explain(error), file=sys.stderr)
        code = 1
    except SystemExit as end:
        # A reader that has had enough is no failure: what Rich and Click make of it is.
        code = 0 if isinstance(end.__context__, BrokenPipeError) else end.code
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        terminal.abandon()
    sys.exit(code)
