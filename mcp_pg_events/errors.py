"""Every failure that a user of this package can meet, as one small tree.

The text of each error is one sentence that says what happened and what to do about it; a class's docstring is its
default text. Driver errors are translated in `database.py`, nowhere else. No text contains a password or a payload.
"""

from __future__ import annotations

__all__ = [
    "AppendRefused",
    "ConfigurationError",
    "DatabaseRefused",
    "DatabaseUnavailable",
    "Error",
    "ListenUnavailable",
    "NotMigrated",
    "SchemaTooOld",
    "StoreClosed",
    "WorkerFenced",
    "WorkerTooOld",
]


class Error(Exception):
    """Something went wrong in mcp_pg_events."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (type(self).__doc__ or "").strip())


class ConfigurationError(Error):
    """An option has a value that cannot work."""


class DatabaseUnavailable(Error):
    """PostgreSQL cannot be reached; check that it runs and that the DSN is right."""


class DatabaseRefused(DatabaseUnavailable):
    """PostgreSQL refused a statement, and will again; see what it says."""


class NotMigrated(Error):
    """The database has no mcp_pg_events schema; run `mcp-pg-events migrate`."""


class SchemaTooOld(NotMigrated):
    """The database's schema is older than this version needs; run `mcp-pg-events migrate`."""


class WorkerTooOld(Error):
    """The database no longer serves workers as old as this one; upgrade mcp_pg_events."""


class ListenUnavailable(Error):
    """LISTEN does not work over this connection; give a direct connection as `listen_dsn`."""


class StoreClosed(Error):
    """The store is not open; enter it with `async with` or start the app's lifespan."""


class WorkerFenced(Error):
    """This worker was declared dead by another one, so its calls have ended."""


class AppendRefused(Error):
    """The event was not stored."""
