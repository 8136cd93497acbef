"""A service's PostgreSQL: nobody is a superuser, and one role has CREATE on its database and no more."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta

import psycopg
import pytest
from psycopg import sql

from mcp_pg_events import migrate, retention
from tests.support.ageing import age
from tests.support.command import mcp_pg_events
from tests.support.log import NOTE, RESULT, open_call, open_session, partitions, query, running, standalone
from tests.support.postgres import PASSWORD, dsn_url

pytestmark = pytest.mark.anyio


@pytest.fixture
def roles(database: str) -> Iterator[tuple[str, str]]:
    """The DSNs of one that may create in the database, and of one that may connect."""
    suffix = database.rpartition("_")[2]
    owner, worker = f"owner_{suffix}", f"worker_{suffix}"
    with psycopg.connect(database, autocommit=True) as admin:
        for role in (owner, worker):
            admin.execute(
                sql.SQL("CREATE ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD {}").format(
                    sql.Identifier(role), PASSWORD
                )
            )
        admin.execute(
            sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(
                sql.Identifier(admin.info.dbname), sql.Identifier(owner)
            )
        )
        yield dsn_url(database, user=owner), dsn_url(database, user=worker)
        for role in (worker, owner):
            admin.execute(sql.SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(sql.Identifier(role)))


async def test_nothing_needs_a_superuser(roles: tuple[str, str]) -> None:
    owner, worker = roles
    await asyncio.to_thread(migrate.upgrade, owner, worker_role=worker.partition("//")[2].partition(":")[0])
    age(owner, events=120)
    async with running(worker, 2) as (store, other):
        key, opened = await open_session(store)
        call = await open_call(store, key)
        await store.log.append(call, NOTE)
        await other.log.append(standalone(key, opened), NOTE)
        await store.log.append(call, RESULT, final=True)
    checked = mcp_pg_events("doctor", "--dsn", worker)
    assert (checked.code, checked.err) == (0, ""), checked.out
    # The function by the worker's role, the command by the owner.
    assert [result for _, result in query(worker, "SELECT * FROM drop_expired('8 days')")] == ["dropped"] * 4
    report = await asyncio.to_thread(retention.run, owner, schema="mcp_events", ttl=timedelta(days=7))
    assert [outcome.result for outcome in report.partitions].count("dropped") == 1
    assert len(partitions(owner)) == 10
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        query(worker, "DELETE FROM events")
    assert query(worker, "SELECT note_timeline() IS NOT NULL") == [(True,)]
