"""Days that have passed: partitions of the past, and events that are moved into them."""

from __future__ import annotations

import psycopg

from tests.support.log import query

DAYS = 12


def age(dsn: str, days: int = DAYS, events: int = 0) -> None:
    """Make partitions of the last days, with events of streams that nobody knows."""
    bound = "date_trunc('day', now(), 'UTC') - %s * interval '1 day'"
    for back in range(1, days + 1):
        [(name, lower, upper)] = query(
            dsn,
            f"SELECT to_char({bound}, 'YYYYMMDDHH24'), {bound}, {bound}",  # type: ignore[arg-type]  # text of this module
            *(back, back, back - 1),
        )
        statement = psycopg.sql.SQL("CREATE TABLE {} PARTITION OF events FOR VALUES FROM ({}) TO ({})")
        query(dsn, statement.format(psycopg.sql.Identifier(f"events_p{name}"), lower, upper))
    if events:
        query(
            dsn,
            "INSERT INTO events (stream, seq, created_at, payload) SELECT 1000000 + n %% 7, n, "
            "now() - (n %% %s) * interval '1 day', '{}' FROM generate_series(1, %s) n",
            days,
            events,
        )


def grow_old(dsn: str, stream: int, up_to: int, days: float) -> None:
    """Make a stream, and its events up to a number, some days older; there have to be partitions for that."""
    query(
        dsn,
        "UPDATE events SET created_at = created_at - %s * interval '1 day' WHERE stream = %s AND seq <= %s",
        *(days, stream, up_to),
    )
    query(
        dsn,
        "UPDATE streams SET created_at = created_at - %s * interval '1 day', mark_at = mark_at - %s * interval '1 day' "
        "WHERE number = %s",
        *(days, days, stream),
    )
