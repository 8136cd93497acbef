"""The connection of an operator's command: one schema, checked, and a limit on how long a statement may take.

What only looks runs in read-only transactions. A pooler in transaction mode may stand in between: nothing is left set
on the connection. Next: `statements.py` has what runs on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, LiteralString

import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from ..errors import Error, SchemaTooOld, WorkerTooOld
from ..migrate import Target, connect, translated
from ..schema import NEEDS, REVISION, check_schema, quote_schema
from . import statements

__all__ = ["Desk", "checked_id", "no_session", "open_desk"]

PATIENCE: Final = 30.0
"""Seconds that one statement may take, unless it says otherwise."""


class Desk:
    """Runs the statements of `statements.py` in one schema. Made by `open_desk`."""

    def __init__(self, connection: psycopg.Connection[DictRow], schema: str) -> None:
        self.connection = connection
        self.schema = schema
        # In a statement with values a percent sign is one of theirs, unless it is doubled.
        self.name = sql.SQL(quote_schema(schema).replace("%", "%%"))

    def look(
        self,
        statement: LiteralString | sql.Composed,
        values: Mapping[str, Any] | None = None,
        *,
        patience: float = PATIENCE,
    ) -> list[DictRow]:
        """Run a statement that changes nothing; its rows. `patience` is how many seconds it may take."""
        with self.transaction(writes=False, patience=patience):
            return self.run(statement, values)

    def run(self, statement: LiteralString | sql.Composed, values: Mapping[str, Any] | None = None) -> list[DictRow]:
        """Run a statement in the transaction that is open; its rows."""
        cursor = self.connection.execute(self.composed(statement), values or {})
        return cursor.fetchall() if cursor.description else []

    def composed(self, statement: LiteralString | sql.Composed) -> sql.Composed:
        """A statement with the schema's name in the place of `{s}`, if that is still to be done."""
        if isinstance(statement, sql.Composed):
            return statement
        return sql.SQL(statement).format(s=self.name)

    @contextmanager
    def transaction(self, *, writes: bool, patience: float = PATIENCE, isolation: LiteralString = "") -> Iterator[None]:
        """A transaction in which no statement takes longer than `patience` seconds."""
        with self.connection.transaction():
            if not writes:
                self.connection.execute("SET TRANSACTION READ ONLY")
            if isolation:
                self.connection.execute(sql.SQL("SET TRANSACTION ISOLATION LEVEL " + isolation))
            # LOCAL: a pooler gives this server connection to somebody else next.
            limit = sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(int(patience * 1000)))
            self.connection.execute(limit)
            yield


@contextmanager
def open_desk(dsn: str, schema: str, work: str) -> Iterator[Desk]:
    """Connect for a command called `work`, to a schema that this version can work with.

    Raises:
        ConfigurationError: the DSN or the schema's name cannot be right.
        DatabaseUnavailable, NotMigrated, WorkerTooOld, Error: it cannot be done here, or not by this role.
    """
    with translated(work), connect(Target(dsn, check_schema(schema)), f"mcp-pg-events {work}") as connection:
        connection.autocommit = True
        connection.prepare_threshold = None
        connection.row_factory = dict_row
        desk = Desk(connection, schema)
        _check(desk)
        yield desk


def _check(desk: Desk) -> None:
    [found] = desk.look(statements.REVISIONS)
    if found["revision"] is None or found["revision"] < NEEDS:
        raise SchemaTooOld(
            f"The database's schema is at revision {found['revision'] or 'none'}, but this version needs {NEEDS}; "
            "run `mcp-pg-events migrate`."
        )
    if found["oldest_worker"] > REVISION:
        raise WorkerTooOld(
            f"The database serves versions from revision {found['oldest_worker']} on, and this one is {REVISION}; "
            "upgrade mcp_pg_events."
        )


def no_session(desk: Desk, session_id: str) -> Error:
    """What to say of a session that is not there."""
    shown = repr(session_id[:200])
    return Error(f"There is no session {shown} in schema {desk.schema}; `mcp-pg-events sessions list` shows those.")


def checked_id(desk: Desk, session_id: str) -> str:
    """A session's id that PostgreSQL's text can take; no other one is anybody's."""
    try:
        session_id.encode()
    except UnicodeEncodeError:
        raise no_session(desk, session_id) from None
    if "\0" in session_id:
        raise no_session(desk, session_id)
    return session_id
