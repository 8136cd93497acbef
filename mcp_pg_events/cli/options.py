"""The options that several commands share, worded once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

__all__ = [
    "Dsn",
    "Host",
    "Json",
    "Level",
    "LivePath",
    "LogLevel",
    "Port",
    "ReadyPath",
    "Schema",
    "SessionId",
    "Workers",
]

LogLevel = Literal["critical", "error", "warning", "info", "debug"]

Dsn = Annotated[
    str | None,
    typer.Option(
        metavar="DSN",
        help="PostgreSQL, as a postgresql:// URI or libpq's key=value form. Otherwise MCP_PG_EVENTS_DSN. "
        "A password is better kept in ~/.pgpass or PGPASSWORD than in an option, which other users can see.",
        show_default=False,
    ),
]

Schema = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The schema that holds everything. Otherwise MCP_PG_EVENTS_SCHEMA, and mcp_events by default.",
        show_default=False,
    ),
]

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

SessionId = Annotated[str, typer.Argument(metavar="SESSION", help="The session's id, its Mcp-Session-Id.")]

Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every interface.")]

Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")]

Workers = Annotated[int, typer.Option(min=1, help="Worker processes. Any of them takes any request of any session.")]

LivePath = Annotated[str, typer.Option(help="Answers 200 as long as the process runs; '' leaves it out.")]

ReadyPath = Annotated[
    str, typer.Option(help="Answers 200, and 503 while starting, draining or without a database; '' leaves it out.")
]

Level = Annotated[LogLevel, typer.Option(help="The least severe messages to log.")]
