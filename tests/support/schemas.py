"""A schema as its migrations leave it: statements in a schema of any name, and its partitions by their bounds."""

from __future__ import annotations

from datetime import datetime
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from mcp_pg_events.partitions import Partition


def query(dsn: str, statement: LiteralString, schema: str = "mcp_events", **parameters: object) -> list[Any]:
    """Run a statement in a schema; the first column of each row."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("SET search_path = {}").format(sql.Identifier(schema)))
        cursor = connection.execute(statement, parameters or None)
        return [row[0] for row in cursor] if cursor.description else []


def partitions(database: str | psycopg.Connection[Any], schema: str = "mcp_events") -> list[Partition]:
    """The partitions of events, by their bounds."""
    if isinstance(database, str):
        with psycopg.connect(database) as connection:
            return partitions(connection, schema)
    bounds = database.execute(
        """SELECT regexp_match(pg_get_expr(c.relpartbound, c.oid), '''(.*)''.*''(.*)''')
           FROM pg_inherits JOIN pg_class c ON c.oid = inhrelid
           WHERE inhparent = (quote_ident(%s) || '.events')::regclass""",
        [schema],
    )
    return sorted(
        Partition(datetime.fromisoformat(lower), datetime.fromisoformat(upper)) for ((lower, upper),) in bounds
    )
