"""What happens beside a retention pass: somebody who reads, stores or detaches; and what the pass came to."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg import sql

from mcp_pg_events.retention import Report
from tests.support.log import query


def results(report: Report) -> dict[str, int]:
    found = [outcome.result for outcome in report.partitions]
    return {result: found.count(result) for result in set(found)}


@contextmanager
def reading(dsn: str) -> Iterator[None]:
    """Somebody who has read events, in a transaction that goes on."""
    with psycopg.connect(dsn) as connection:
        connection.execute("SELECT count(*) FROM mcp_events.events").fetchone()
        yield
        connection.rollback()


def detach_and_give_up(dsn: str, name: str) -> None:
    """What is left of a DBA's DETACH CONCURRENTLY that met a reader: the partition is hidden, and stands."""
    with reading(dsn), psycopg.connect(dsn, autocommit=True) as dba:
        dba.execute("SET lock_timeout = '100ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            dba.execute(
                sql.SQL("ALTER TABLE mcp_events.events DETACH PARTITION mcp_events.{} CONCURRENTLY").format(
                    sql.Identifier(name)
                )
            )
    assert query(dsn, "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhdetachpending") == [(name,)]


@contextmanager
def appending(dsn: str) -> Iterator[list[float]]:
    """Somebody who stores events all the while, and how long each took."""
    took: list[float] = []
    over = threading.Event()

    def append() -> None:
        with psycopg.connect(dsn, autocommit=True) as connection:
            while not over.is_set():
                began = time.monotonic()
                connection.execute(
                    "INSERT INTO mcp_events.events (stream, seq, payload) VALUES (999, %s, '{}')", [len(took) + 1]
                )
                took.append(time.monotonic() - began)

    thread = threading.Thread(target=append)
    thread.start()
    try:
        yield took
    finally:
        over.set()
        thread.join()
