"""`mcp-pg-events doctor`: what is wrong with the database, and what to do. Next: `mcp_pg_events.doctor`."""

from __future__ import annotations

import dataclasses
import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from ..settings import Settings
from .options import Dsn, Schema

if TYPE_CHECKING:
    from ..doctor import Check

__all__ = ["doctor"]

INDENT = 20


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
    failed = any(check.status == "fail" for check in made)
    if as_json:
        print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in made]}))
    else:
        width = shutil.get_terminal_size((80, 24)).columns
        print("\n".join(_lines(check, width) for check in made))
    if failed:
        raise typer.Exit(1)


def _lines(check: Check, width: int) -> str:
    head = f"{check.status:<5} {check.name:<13} "
    advice = [f"-> {check.advice}"] if check.advice else []
    return "\n".join(
        textwrap.fill(
            text,
            max(width, INDENT + 20),
            initial_indent=head if place == 0 else " " * INDENT,
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for place, text in enumerate([check.found, *advice])
    )
