"""A role of a test's own, which may log in and owns nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.postgres import PASSWORD, database_name


@contextlib.contextmanager
def login_role(dsn: str) -> Iterator[tuple[str, str]]:
    """The name of a new role, which has to be quoted, and the DSN of its login to the database of `dsn`."""
    name = f"role of {database_name(dsn)}"
    role = sql.Identifier(name)
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, PASSWORD))
        try:
            yield name, make_conninfo(dsn, user=name, password=PASSWORD)
        finally:
            admin.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(role))
