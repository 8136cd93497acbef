"""Which revision of the tables this version needs, and how a schema's name is written in SQL.

A worker holds NEEDS and REVISION against what the database says when it starts, and refuses only below either side's
oldest. The tables themselves are in `tables.py` and `migrations/`.
"""

from __future__ import annotations

from mcp_pg_events.errors import ConfigurationError

__all__ = ["DEFAULT_SCHEMA", "NEEDS", "REVISION", "check_schema", "quote_schema"]

REVISION = "0009"
"""The newest revision that this version knows, and that `mcp-pg-events migrate` brings a database to."""

NEEDS = "0007"
"""The oldest revision of the schema that this version can work with. Revisions compare as strings."""

DEFAULT_SCHEMA = "mcp_events"


def check_schema(name: str) -> str:
    """Return `name` when PostgreSQL can take it, whole, as the name of a schema; raise ConfigurationError otherwise.

    A longer name would be cut to 63 bytes in silence, and two servers could meet in one schema.
    """
    if not name:
        raise ConfigurationError("The schema's name is empty.")
    if "\0" in name or not name.isprintable():
        raise ConfigurationError(f"The schema's name {name!r} contains a character that cannot be printed.")
    if len(name.encode()) > 63:
        raise ConfigurationError(f"The schema's name {name!r} is longer than PostgreSQL's limit of 63 bytes.")
    if name.startswith("pg_") or name == "information_schema":
        raise ConfigurationError(f"The schema's name {name!r} is reserved by PostgreSQL.")
    return name


def quote_schema(name: str) -> str:
    """Return the checked `name` as an SQL identifier, always quoted."""
    return '"' + check_schema(name).replace('"', '""') + '"'
