"""With sixty partitions, resuming, live reads and appends lock the few that they need.

What counts is `pg_locks` after each statement, over a dozen executions on connections that prepare everything: EXPLAIN
shows the partitions that a generic plan locks and does not run as "never executed" only, and PostgreSQL chooses that
plan at the sixth execution.

The bound: a stream of today is read from the partition of today, those made ahead (two, since a read has no upper
bound), and that of yesterday while the margin for clock steps reaches back over midnight. An append locks one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import psycopg
import pytest

from mcp_pg_events.direct import Direct
from tests.support.log import (
    NOTE,
    RESULT,
    numbered,
    open_call,
    open_session,
    partitions,
    query,
    running,
    standalone,
    stored,
)

pytestmark = pytest.mark.anyio

PARTITIONS = 60
EXECUTIONS = 12
READ = 4
"""Today, two ahead, and yesterday around midnight."""
RELATIONS = 32
"""All relations of the schema that one statement may lock: those partitions, each with its index, and the tables and
indexes of sessions, streams and workers. It was 121 for a read without a bound."""


class Locked(NamedTuple):
    """What one execution had locked, and how often its statement was planned generically so far."""

    partitions: int
    relations: int
    generic_plans: int | None


Counts = dict[str, list[Locked]]


@pytest.fixture
def sixty_partitions(migrated: str) -> str:
    statement = """
        DO $$ BEGIN
            FOR age IN 1..57 LOOP
                EXECUTE format(
                    'CREATE TABLE mcp_events.%I PARTITION OF mcp_events.events FOR VALUES FROM (%L) TO (%L)',
                    'events_p' || to_char(date_trunc('day', now(), 'UTC') - age * interval '1 day', 'YYYYMMDDHH24'),
                    date_trunc('day', now(), 'UTC') - age * interval '1 day',
                    date_trunc('day', now(), 'UTC') - (age - 1) * interval '1 day');
            END LOOP;
        END $$
    """
    query(migrated, "SELECT ensure_partitions(2)")
    query(migrated, psycopg.sql.SQL(statement))
    assert len(partitions(migrated)) == PARTITIONS
    return migrated


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counts]:
    """By the names of statements, what each execution had locked."""
    counts: Counts = defaultdict(list)
    execute = psycopg.AsyncConnection.execute
    count = """
        SELECT count(DISTINCT relation) FILTER (WHERE relation IN
                   (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'mcp_events.events'::regclass)),
               count(DISTINCT relation),
               (SELECT max(generic_plans) FROM pg_prepared_statements WHERE starts_with(statement, %s))
          FROM pg_locks JOIN pg_class c ON c.oid = relation
         WHERE pid = pg_backend_pid() AND relnamespace = 'mcp_events'::regnamespace
    """

    async def note(connection: Any, statement: bytes) -> None:
        comment = statement.partition(b" */")[0].decode()
        row = await (await execute(connection, count, [comment + " */"], prepare=False)).fetchone()
        counts[comment.rpartition(":")[2]].append(Locked(*row))

    async def counted(connection: Any, statement: Any, *args: Any, **arguments: Any) -> Any:
        if not (isinstance(statement, bytes) and statement.startswith(b"/* mcp_pg_events:")):
            return await execute(connection, statement, *args, **arguments)
        async with connection.transaction():
            cursor = await execute(connection, statement, *args, **arguments)
            await note(connection, statement)
        return cursor

    fetch = Direct.fetch

    async def counted_too(direct: Direct, statement: bytes, *args: Any, **arguments: Any) -> Any:
        async with direct._connection.transaction():
            rows = await fetch(direct, statement, *args, **arguments)
            await note(direct._connection, statement)
        return rows

    monkeypatch.setattr(psycopg.AsyncConnection, "execute", counted)
    monkeypatch.setattr(Direct, "fetch", counted_too)
    yield counts


def assert_few(locked: Counts, **limits: int) -> None:
    """Each of these statements ran a dozen times, and never locked more partitions than its limit."""
    for name, limit in limits.items():
        assert len(locked[name]) >= EXECUTIONS, (name, len(locked[name]))
        assert max(each.partitions for each in locked[name]) <= limit, (name, locked[name])
    # Nor did any statement that came along.
    for name, found in locked.items():
        if name != "ensure_partitions":
            assert max(each.partitions for each in found) <= READ, (name, found)
            assert max(each.relations for each in found) <= RELATIONS, (name, found)


async def test_resuming_and_reading_live_lock_the_partitions_of_the_present(
    sixty_partitions: str, locked: Counts
) -> None:
    async with running(sixty_partitions, 2, prepare_threshold=0, max_connections=1) as (store, other):
        key, _ = await open_session(store)
        stream = await open_call(store, key)
        for index in range(EXECUTIONS):
            await store.log.append(stream, numbered(0, index))
            held = await other.log.attach(key, stream.number, index, patience=5)
            page = await other.log.read(stream.number, index, held.bound)
            assert [event.seq for event in page.events] == [index + 1]
            live = await other.log.read(stream.number, index + 1, other.log.bound_after(page.events[0]))
            assert live.events == []
            await other.log.detach(stream.number, held.generation, index + 1)
        await store.log.append(stream, RESULT, final=True)
    assert_few(locked, attach=READ, read=READ, find_stream=0, detach=0)


async def test_appending_locks_one_partition(sixty_partitions: str, locked: Counts) -> None:
    async with running(sixty_partitions, 1, prepare_threshold=0) as (store,):
        key, opened = await open_session(store)
        stream, shared = await open_call(store, key), standalone(key, opened)
        for _ in range(EXECUTIONS):
            await store.log.append(stream, NOTE)
            await store.log.append(shared, NOTE)
        await store.log.append(stream, RESULT, final=True)
    assert_few(locked, append=1, append_shared=1)
    for name in ("append", "append_shared"):
        assert locked[name][-1].generic_plans, "no generic plan was counted, and it is those that lock everything"


async def test_a_session_of_a_month_is_resumed_from_its_recent_partitions(
    sixty_partitions: str, locked: Counts
) -> None:
    """Its standalone stream began a month ago. A mark, moved on by its appends, spares the partitions in between."""
    async with running(sixty_partitions, 1, prepare_threshold=0, max_connections=1) as (store,):
        key, opened = await open_session(store)
        shared = standalone(key, opened)
        for index in range(3):
            await store.log.append(shared, numbered(0, index))
        aged = "now() - interval '30 days'"
        statement = "UPDATE {} SET created_at = {}, mark_at = {} WHERE number = %s"
        query(
            sixty_partitions,
            psycopg.sql.SQL(statement).format(*map(psycopg.sql.SQL, ("streams", aged, aged))),
            opened.standalone,
        )
        query(
            sixty_partitions,
            "UPDATE events SET created_at = now() - interval '30 days' WHERE stream = %s",
            opened.standalone,
        )
        await store.log.append(shared, numbered(0, 3))
        locked.clear()
        for index in range(EXECUTIONS):
            await store.log.append(shared, numbered(0, 4 + index))
            held = await store.log.attach(key, None, 4 + index, patience=5)
            page = await store.log.read(opened.standalone, 4 + index, held.bound)
            assert [event.seq for event in page.events] == [5 + index]
        assert_few(locked, attach=READ, read=READ)
        # One who comes back to where the month began still gets everything.
        held = await store.log.attach(key, opened.standalone, 1, patience=5)
        page = await store.log.read(opened.standalone, 1, held.bound)
        assert [(event.seq, event.payload) for event in page.events] == stored(sixty_partitions, opened.standalone)[1:]


async def test_ending_calls_for_their_worker_locks_the_partitions_of_the_present(
    sixty_partitions: str, locked: Counts
) -> None:
    async with running(sixty_partitions, 2, prepare_threshold=0, max_connections=1) as (store, other):
        for _ in range(EXECUTIONS):
            key, _ = await open_session(store)
            await store.log.append(await open_call(store, key), NOTE)
            await other.log.end_session(key, "deleted")
    assert_few(locked, end_session=READ)
