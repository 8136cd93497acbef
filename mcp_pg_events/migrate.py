"""Brings a database to this version's schema, or writes the script that a DBA would run for it.

Migrations and SQL live in `migrations/` and `sql/`, and the wheel carries both inside the package. `upgrade`,
`downgrade` and `render` serve the command line, the tests and the embedded database; `alembic` in a checkout runs the
same `migrations/env.py`, which asks `Target` where to go. What they make is described in `schema.py`.

Everything here blocks: call it before an event loop runs, or in a thread.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import psycopg
from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import DDL
from sqlalchemy.exc import DBAPIError

from mcp_pg_events.errors import ConfigurationError, DatabaseUnavailable, Error, NotMigrated, WorkerTooOld
from mcp_pg_events.partitions import INTERVALS
from mcp_pg_events.schema import DEFAULT_SCHEMA, REVISION, check_schema
from mcp_pg_events.settings import Settings

__all__ = [
    "Target",
    "connect",
    "current",
    "downgrade",
    "grant_worker",
    "read_sql",
    "render",
    "require_dsn",
    "translated",
    "upgrade",
    "verbatim",
]

CONNECT_TIMEOUT = 10
"""Seconds, where neither the DSN nor PGCONNECT_TIMEOUT says otherwise."""

_one_at_a_time = threading.RLock()  # Alembic's context belongs to the whole process

NO_DSN = "No database was given; set MCP_PG_EVENTS_DSN or pass --dsn, for example postgresql://localhost/app."


@dataclass(frozen=True, slots=True)
class Target:
    """Where the migrations go: a database, and a schema in it."""

    dsn: str | None
    schema: str = DEFAULT_SCHEMA
    partition_interval: str = "day"

    def __post_init__(self) -> None:
        check_schema(self.schema)
        if self.partition_interval not in INTERVALS:
            known = ", ".join(INTERVALS)
            raise ConfigurationError(f"The partition interval is one of {known}, not {self.partition_interval!r}.")

    def config(self, output: io.StringIO | None = None) -> Config:
        """Return what Alembic's commands take, quiet but for `output`."""
        config = Config(output_buffer=output, attributes={"target": self})
        config.set_main_option("script_location", str(_directory("migrations")).replace("%", "%%"))
        return config

    @classmethod
    def given(cls, config: Config) -> Target | None:
        """Return the target that `config()` put into a running command; None in one of `alembic` itself."""
        given = config.attributes.get("target")
        return given if isinstance(given, cls) else None

    @classmethod
    def of(cls, config: Config, arguments: Mapping[str, Any]) -> Target:
        """Return the target of a running command: ours, or the one that `alembic -x` and the environment name."""
        if (given := cls.given(config)) is not None:
            return given
        unknown = ", ".join(set(arguments) - {"dsn", "schema", "partition_interval"})
        if unknown:
            raise ConfigurationError(f"Unknown -x argument: {unknown}; there are dsn, schema and partition_interval.")
        settings = Settings.given(dsn=arguments.get("dsn"), schema=arguments.get("schema"))
        return cls(settings.database, settings.schema_name, arguments.get("partition_interval", "day"))


def upgrade(
    dsn: str,
    *,
    schema: str = DEFAULT_SCHEMA,
    revision: str = "head",
    partition_interval: str | None = None,
    worker_role: str | None = None,
) -> None:
    """Bring `schema` up to `revision`, making it first if need be; nothing happens when it is there already.

    Two that run at once are safe: the second waits, and finds nothing to do. `partition_interval` (hour, day, week or
    month; day at the first migration) holds for the partitions that are made from now on.
    `worker_role` is granted the least that a worker needs.
    """
    target = Target(dsn, schema, partition_interval or "day")
    with translated():
        command.upgrade(target.config(), revision)
        if partition_interval is None and worker_role is None:
            return
        with connect(target) as connection:
            if partition_interval is not None:
                _set_interval(connection, schema, partition_interval)
            if worker_role is not None:
                _grant(connection, schema, worker_role)


def downgrade(dsn: str, *, schema: str = DEFAULT_SCHEMA, revision: str) -> None:
    """Take `schema` down to `revision`; "base" removes every table and event, and the schema if it is empty then."""
    with translated():
        command.downgrade(Target(dsn, schema).config(), revision)


def render(
    *,
    schema: str = DEFAULT_SCHEMA,
    revision: str = "head",
    down: bool = False,
    partition_interval: str | None = None,
    worker_role: str | None = None,
) -> str:
    """Return the script that the same upgrade or downgrade would run, for a DBA to read and run; needs no database.

    `revision` may be a range, `0001:0002`; without one an upgrade starts at base and a downgrade at this version's
    revision.
    """
    output = io.StringIO()
    config = Target(None, schema, partition_interval or "day").config(output)
    with translated():
        if down:
            command.downgrade(config, revision if ":" in revision else f"{REVISION}:{revision}", sql=True)
        else:
            command.upgrade(config, revision, sql=True)
    if worker_role is not None:
        output.write(grant_worker(schema, worker_role).as_string())
    return output.getvalue()


def current(dsn: str, *, schema: str = DEFAULT_SCHEMA) -> str | None:
    """Return the revision that `schema` is at; None where no migration has run."""
    query = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier(check_schema(schema), "alembic_version"))
    with translated(), connect(Target(dsn, schema)) as connection:
        try:
            row = connection.execute(query).fetchone()
        except psycopg.errors.UndefinedTable:
            return None
    return str(row[0]) if row is not None else None


def grant_worker(schema: str, role: str) -> sql.Composed:
    """Return the statements that give `role` the least privileges that a worker needs."""
    if not role:
        raise ConfigurationError("The worker role's name is empty.")
    statements = sql.SQL(cast("Any", read_sql("grants.sql")))
    return statements.format(schema=sql.Identifier(check_schema(schema)), role=sql.Identifier(role))


def require_dsn(dsn: str | None) -> str:
    """Return `dsn`; where there is none, raise ConfigurationError, saying how to give one."""
    if not dsn:
        raise ConfigurationError(NO_DSN)
    return dsn


def connect(target: Target, application: str = "mcp-pg-events migrate") -> psycopg.Connection[Any]:
    """Connect as libpq does, so that every DSN that works elsewhere works for migrations."""
    try:
        given = conninfo_to_dict(require_dsn(target.dsn))
    except psycopg.ProgrammingError:
        # libpq's message quotes the DSN, password and all.
        raise ConfigurationError("The DSN is neither a postgresql:// URI nor libpq's key=value form.") from None
    given.setdefault("application_name", application)
    if "PGCONNECT_TIMEOUT" not in os.environ:
        given.setdefault("connect_timeout", CONNECT_TIMEOUT)
    return psycopg.connect(**cast("dict[str, Any]", given))


def read_sql(name: str) -> str:
    """Return the text of a file in `sql/`."""
    return (_directory("sql") / name).read_text(encoding="utf-8")


def verbatim(statements: str) -> DDL:
    """Return `statements` so that they reach PostgreSQL unchanged, with their colons and percent signs."""
    # Unlike text(), DDL() takes no colon for a parameter.
    return DDL(statements.strip().removesuffix(";").replace("%", "%%"))  # type: ignore[no-untyped-call]


def _directory(name: str) -> Path:
    """Find migrations or SQL: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parent / name


def _set_interval(connection: psycopg.Connection[Any], schema: str, wanted: str) -> None:
    """Make new partitions of this length, from the end of those that are there."""
    statement = sql.SQL("UPDATE {} SET partition_interval = {wanted} WHERE partition_interval <> {wanted}")
    connection.execute(statement.format(sql.Identifier(schema, "settings"), wanted=sql.Literal(wanted)))


def _grant(connection: psycopg.Connection[Any], schema: str, role: str) -> None:
    try:
        connection.execute(grant_worker(schema, role))
    except psycopg.errors.UndefinedObject:
        raise ConfigurationError(
            f"Schema {schema} is migrated, but there is no role {role!r} to grant anything to: "
            f"CREATE ROLE it, and run this again."
        ) from None


@contextmanager
def translated(work: str = "migration") -> Iterator[None]:
    """Say in one sentence, and without a password, what Alembic or PostgreSQL refused to a command."""
    try:
        with _one_at_a_time if work == "migration" else nullcontext():
            yield
    except CommandError as error:
        if "Can't locate revision" in str(error):
            raise WorkerTooOld(
                f"There is no revision {str(error).rpartition(' ')[2]} in this version of mcp_pg_events, which knows "
                f"revisions up to '{REVISION}'; if the database is already there, upgrade the package."
            ) from error
        raise Error(f"The migration did not run: {error}") from error
    except (DBAPIError, psycopg.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise _explain(cause if isinstance(cause, psycopg.Error) else psycopg.Error(str(cause)), work) from error


def _explain(error: psycopg.Error, work: str) -> Error:
    who = "the migration" if work == "migration" else f"`mcp-pg-events {work}`"
    first = next(iter(str(error).splitlines()), type(error).__name__)  # advice and further attempts follow
    message = error.diag.message_primary or " ".join(first.split())
    if work != "migration" and isinstance(error, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedFunction):
        return NotMigrated("The database has no schema of mcp_pg_events, or an older one; run `mcp-pg-events migrate`.")
    if work != "migration" and isinstance(error, psycopg.errors.InsufficientPrivilege):
        return Error(f"The role that runs {who} lacks a right: {message}; use the role that owns the tables.")
    if isinstance(error, psycopg.errors.InsufficientPrivilege):
        return Error(f"The role that migrates lacks a right: {message}; use the database's owner, or hand a DBA --sql.")
    if isinstance(error, psycopg.OperationalError) and error.sqlstate is None:
        return DatabaseUnavailable(f"PostgreSQL did not let {who} in: {message}")
    return Error(f"PostgreSQL refused {who}: {message}")
