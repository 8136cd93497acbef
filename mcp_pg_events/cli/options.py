"""The options that several commands share, worded once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

__all__ = ["Dsn", "LogLevel", "Schema"]

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
