"""`mcp-pg-events doctor`: what is wrong with the database, and what to do. Next: `mcp_pg_events.doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..settings import Settings
from .options import Dsn, Schema
from .report import tell_verdict

__all__ = ["doctor"]


def doctor(
    dsn: Dsn = None,
    schema: Schema = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON.")] = False,
) -> None:
    """Check the database and its settings, and say what to do about each thing that is wrong.

    Give it the DSN that the workers use, and MCP_PG_EVENTS_LISTEN_DSN if they have one. It changes nothing.

    Exit codes: 0 nothing fails (there may be warnings), 1 something does, 2 wrong options.
    """
    from .. import doctor as checks
    from .. import migrate

    settings = Settings.given(dsn=dsn, schema=schema)
    listen_dsn = settings.listen_dsn.get_secret_value() if settings.listen_dsn else None
    database = migrate.require_dsn(settings.database)
    made = checks.examine(database, schema=settings.schema_name, listen_dsn=listen_dsn)
    tell_verdict(made, as_json=as_json)
