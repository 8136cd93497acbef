"""Every statement of the hot path, named and described, for one schema.

`Queries("mcp_events").append` is bytes, ready for psycopg, with the schema's name quoted in. Names of parameters are
the same everywhere: `me` is this worker's number, `epoch` its fence, `session`, `server` and `owner` say who asks for
what, `bound` is the lower bound on `created_at` that keeps a read off the partitions that it does not need.

The texts are in `statements/`. Whoever changes the locks of one has to see those of the others: sessions come before
workers, workers before streams. Next: `database.py` runs them.
"""

from __future__ import annotations

from typing import Any

from .backend import SessionKey
from .schema import quote_schema
from .statements import endings, letters, log, readers, relayed, sessions, workers

__all__ = ["Queries", "asking"]

_STATEMENTS = {
    name: text
    for module in (workers, sessions, log, readers, letters, relayed, endings)
    for name, text in module.statement.items()
}


class Queries:
    """The statements above for one schema, as bytes. An unknown name raises AttributeError."""

    def __init__(self, schema: str) -> None:
        quoted = quote_schema(schema).replace("%", "%%")
        for name, text in _STATEMENTS.items():
            setattr(self, name, f"/* mcp_pg_events:{name} */{text.format(s=quoted)}".encode())

    def __getattr__(self, name: str) -> bytes:
        # Only reached for a name that `__init__` did not set.
        raise AttributeError(f"no statement is called {name!r}")


def asking(key: SessionKey) -> dict[str, Any]:
    """Who asks for what, as the statements want it."""
    return {
        "session": key.session_id,
        "server": key.server,
        "owner": key.owner,
        "idle": key.idle_timeout,
        "touch": key.touch_interval,
    }
