"""Runs the migrations in one schema and one transaction, for `alembic` and for `mcp-pg-events migrate` alike.

The DSN comes from `-x dsn=` or MCP_PG_EVENTS_DSN, the schema from `-x schema=` or MCP_PG_EVENTS_SCHEMA, and the length
of a partition, at the first migration, from `-x partition_interval=`. Everything is looked up through the
`search_path`, so that no migration names the schema.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from alembic import context
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from mcp_pg_events.errors import Error
from mcp_pg_events.migrate import Target, connect, require_dsn, translated, verbatim
from mcp_pg_events.schema import quote_schema
from mcp_pg_events.tables import METADATA

LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('mcp_pg_events.migrate', 0))"


def include_name(name: str | None, kind: str, parents: object) -> bool:
    """Leave the partitions, and whatever else shares the schema, out of `alembic check`."""
    return kind != "table" or name in METADATA.tables


def migrate(target: Target, connection: Connection | None) -> None:
    schema = quote_schema(target.schema)
    reached_base = False

    def note_step(ctx: MigrationContext, step: object, heads: Collection[Any], run_args: object) -> None:
        nonlocal reached_base
        reached_base = not heads

    context.configure(
        connection=connection,
        dialect_name="postgresql",
        dialect_opts={"paramstyle": "named"},  # a percent sign of a script stays single
        target_metadata=METADATA,
        include_name=include_name,
        compare_server_default=True,
        on_version_apply=note_step,
        partition_interval=target.partition_interval,
    )
    running: MigrationContext = context.get_context()
    reads_only = bool(running.opts.get("dont_mutate"))
    with context.begin_transaction():
        if not reads_only:
            # One lock for all schemas: two first migrations of one schema would both create it.
            context.execute(LOCK)
            if connection is None:
                exists = context.get_starting_revision_argument() is not None
            else:
                exists = has_schema(connection, target.schema)
            if not exists:
                context.execute(verbatim(f"CREATE SCHEMA {schema}"))
                context.execute(verbatim(f"COMMENT ON SCHEMA {schema} IS 'mcp_pg_events'"))
        # pg_temp is named, and last, because ensure_partitions keeps this path and runs with its owner's rights.
        context.execute(verbatim(f"SET LOCAL search_path = {schema}, pg_temp"))
        if connection is not None and not reads_only and "" < max(running.get_current_heads(), default="") < "0007":
            # The step to 0007 changes it when others have locked streams; a worker's append locks it before them.
            context.execute("LOCK TABLE ONLY events IN ACCESS EXCLUSIVE MODE")
        context.run_migrations()
        if connection is not None and not reads_only:
            reached_base = not running.get_current_heads()
        if reached_base:
            context.execute("DROP TABLE IF EXISTS alembic_version")  # some versions of Alembic did so themselves
            context.execute(verbatim(drop_schema(schema)))


def has_schema(connection: Connection, name: str) -> bool:
    query = "SELECT 1 FROM pg_namespace WHERE nspname = %s"
    return connection.exec_driver_sql(query, (name,)).first() is not None


def drop_schema(schema: str) -> str:
    """Drop the schema if a migration made it and nothing of anybody else's is in it."""
    tag = "mcp_pg_events"
    while f"${tag}$" in schema:
        tag += "_"
    literal = schema.replace("'", "''")
    return f"""\
DO ${tag}$
BEGIN
    IF obj_description('{literal}'::regnamespace, 'pg_namespace') = 'mcp_pg_events' THEN
        DROP SCHEMA {schema};
    END IF;
EXCEPTION WHEN dependent_objects_still_exist THEN
    RAISE NOTICE 'the schema holds objects that mcp_pg_events did not make, and stays';
END
${tag}$"""


def main() -> None:
    if Target.given(context.config) is not None:
        run()  # whoever called has their own translation
        return
    try:
        with translated():
            run()
    except Error as error:
        raise CommandError(str(error)) from error  # which `alembic` prints as one line


def run() -> None:
    target = Target.of(context.config, context.get_x_argument(as_dictionary=True))
    if context.is_offline_mode():
        migrate(target, None)
        return
    require_dsn(target.dsn)
    engine = create_engine("postgresql+psycopg://", creator=lambda: connect(target), poolclass=NullPool)
    # Whoever waited for the lock has to see what its holder did.
    with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
        connection.dialect.default_schema_name = target.schema
        migrate(target, connection)


main()
