"""`mcp-pg-events sessions` in this process, and sessions for it that nobody opened."""

from __future__ import annotations

from tests.support.command import Ran, mcp_pg_events
from tests.support.log import query


def sessions(dsn: str, command: str, *arguments: str) -> Ran:
    return mcp_pg_events("sessions", command, "--dsn", dsn, *arguments)


def fill(dsn: str, count: int = 10) -> None:
    """Sessions s1 (the newest) to s<count>: of two servers, two owners, every third ended; a call runs in s4 and s5."""
    query(
        dsn,
        """
        INSERT INTO sessions (id, server, owner, created_at, seen_at, ended_at, ended_reason)
        SELECT 's' || n, CASE WHEN n %% 2 = 0 THEN 'even' ELSE 'odd' END,
               CASE WHEN n %% 5 = 0 THEN '"ann"' WHEN n %% 5 = 1 THEN '["client", "issuer", "bob"]' END,
               now() - n * interval '1 hour', now() - n * interval '1 minute',
               CASE WHEN n %% 3 = 0 THEN now() END, CASE WHEN n %% 3 = 0 THEN 'deleted' END
          FROM generate_series(1, %s) n
        """,
        count,
    )
    query(
        dsn,
        "INSERT INTO streams (session_id, request_id, request_key, method, reader_worker) VALUES "
        "('s4', '1', 'i1', 'tools/call', 3), ('s5', '1', 'i1', 'prompts/get', NULL)",
    )
