"""`mcp-pg-events migrate`: make or change the tables, or print the SQL that would. Next: `mcp_pg_events.migrate`."""

from __future__ import annotations

from typing import Annotated

import typer

from mcp_pg_events.cli.options import Dsn, Schema
from mcp_pg_events.partitions import Interval
from mcp_pg_events.settings import Settings

__all__ = ["migrate"]


def migrate(
    dsn: Dsn = None,
    schema: Schema = None,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the script instead of running it; needs no database.")
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="REVISION",
            help="Stop at this revision. With --sql a range 0001:0002 also works.",
            show_default="head",
        ),
    ] = None,
    partition_interval: Annotated[
        Interval | None,
        typer.Option(help="Length of the partitions of the event log that are made from now on.", show_default="day"),
    ] = None,
    worker_role: Annotated[
        str | None,
        typer.Option(
            metavar="ROLE",
            help="Grant an existing role the least that a worker needs. Workers then need not own the tables.",
            show_default=False,
        ),
    ] = None,
    downgrade: Annotated[
        bool,
        typer.Option(
            "--downgrade", help="Go down to --revision instead; `--revision base` removes everything, events too."
        ),
    ] = False,
) -> None:
    """Bring the database's schema to the revision that this version needs.

    Run it before new workers start. It is safe to run at any time, and several times at once: workers of the previous
    version keep running, and when there is nothing to do it changes nothing.

    Who runs it will own the tables, and needs the right to create a schema, or to own one of that name already. Where
    only a DBA may do that, `mcp-pg-events migrate --sql > migrate.sql` gives the script.

    Examples:

        mcp-pg-events migrate --dsn postgresql://owner@db.example/app --worker-role app

        mcp-pg-events migrate --sql --schema mcp_staging --partition-interval hour
    """
    from mcp_pg_events import migrate as migrations  # SQLAlchemy takes half a second that --help need not

    settings = Settings.given(dsn=dsn, schema=schema)
    name = settings.schema_name
    if downgrade and revision is None:
        raise typer.BadParameter("--downgrade needs --revision, and `--revision base` removes everything.")
    if downgrade and (worker_role is not None or partition_interval is not None):
        raise typer.BadParameter("--worker-role and --partition-interval are for upgrades, not for --downgrade.")
    if sql:
        script = migrations.render(
            schema=name,
            revision=revision or "head",
            down=downgrade,
            partition_interval=partition_interval,
            worker_role=worker_role,
        )
        print(script, end="")
        return
    database = migrations.require_dsn(settings.database)
    if downgrade:
        migrations.downgrade(database, schema=name, revision=revision or "base")
    else:
        migrations.upgrade(
            database,
            schema=name,
            revision=revision or "head",
            partition_interval=partition_interval,
            worker_role=worker_role,
        )
    reached = migrations.current(database, schema=name)
    print(f"Schema {name} is at revision {reached}." if reached else f"Schema {name} holds nothing of mcp_pg_events.")
