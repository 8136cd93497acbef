"""How a store starts, and how it says that it cannot (invariant 19: never with a password)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import traceback
from typing import Any

import psycopg
import pytest
from mcp.server.lowlevel import Server

from mcp_pg_events import PostgresStore, durable
from mcp_pg_events.backend import SessionUnknown
from mcp_pg_events.errors import (
    ConfigurationError,
    DatabaseUnavailable,
    Error,
    NotMigrated,
    SchemaTooOld,
    StoreClosed,
    WorkerTooOld,
)
from mcp_pg_events.migrate import upgrade
from mcp_pg_events.schema import NEEDS, REVISION
from tests.support.log import NOTE, open_call, open_session, parts, query, running, standalone, stored, until
from tests.support.postgres import PASSWORD, database_name, dsn_url, free_port
from tests.support.serving import serving

pytestmark = pytest.mark.anyio

SECRET = "a-password-that-must-not-show"


async def refusal(dsn: str, kind: type[Error], caplog: pytest.LogCaptureFixture, **options: Any) -> str:
    """The sentence with which a store refuses to start; neither it nor the log gives anything away."""
    store = PostgresStore(dsn, **options)
    async with asyncio.timeout(15):
        with pytest.raises(kind) as refused:
            await store.__aenter__()
    assert type(refused.value) is kind
    said = str(refused.value)
    everything = "".join(traceback.format_exception(refused.value)) + caplog.text
    assert SECRET not in everything and PASSWORD not in everything
    assert "\n" not in said and "Traceback" not in caplog.text
    with pytest.raises(StoreClosed):
        _ = store.log
    return said


# Where there is no database


@pytest.mark.parametrize(
    "changes",
    [
        {"port": 1},
        {"dbname": "no_such_database"},
        {"user": "no_such_role", "password": SECRET},
        {"host": "no-such-host.invalid"},
    ],
    ids=lambda changes: "-".join(changes),
)
async def test_a_wrong_dsn_is_one_sentence(
    changes: dict[str, str | int], migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {name: free_port() if name == "port" else value for name, value in changes.items()}
    wrong = dsn_url(migrated_once, **{"connect_timeout": 2, **changes})
    assert "PostgreSQL cannot be used" in await refusal(wrong, DatabaseUnavailable, caplog)
    # It listens elsewhere: that is found out as well.
    await refusal(migrated_once, DatabaseUnavailable, caplog, listen_dsn=wrong)


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://user:{SECRET}@[::1/database",  # libpq's complaint quotes it all
        f"postgresql://user:{SECRET}@host/database?no_such_option=1",
        f"host=h password='{SECRET}",
        f"password={SECRET} nonsense",
        "not a dsn",
        "mysql://host/database",
    ],
)
def test_what_is_no_dsn_is_refused_at_once_and_not_repeated(dsn: str) -> None:
    for given in ({"dsn": dsn}, {"dsn": "postgresql://host/database", "listen_dsn": dsn}):
        with pytest.raises(ConfigurationError, match="DSN cannot be read") as refused:
            PostgresStore(**given)
        assert SECRET not in "".join(traceback.format_exception(refused.value))


async def test_an_app_whose_database_is_away_does_not_start_and_shows_no_password(
    migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = dsn_url(migrated_once, port=free_port(), password=SECRET)
    with pytest.raises(RuntimeError, match="did not start"):
        async with serving(durable(Server("away").streamable_http_app(), wrong)):
            pass
    assert "PostgreSQL cannot be used" in caplog.text
    assert SECRET not in caplog.text


# Where the database and this version do not fit


async def test_a_database_without_the_schema_is_named_with_the_command(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    said = await refusal(database, NotMigrated, caplog)
    assert "'mcp_events'" in said and "`mcp-pg-events migrate`" in said and "--schema" not in said
    said = await refusal(database, NotMigrated, caplog, schema="another")
    assert "'another'" in said and "`mcp-pg-events migrate`" in said and "`--schema another`" in said
    # The same store starts once that is done.
    store = PostgresStore(database)
    with pytest.raises(NotMigrated):
        await store.__aenter__()
    upgrade(database)
    async with store:
        await open_session(store)


async def test_a_schema_or_a_worker_that_is_too_old_is_told_both_revisions_and_the_command(
    migrated: str, caplog: pytest.LogCaptureFixture
) -> None:
    query(migrated, "UPDATE alembic_version SET version_num = '0000'")
    said = await refusal(migrated, SchemaTooOld, caplog)
    assert "0000" in said and NEEDS in said and "`mcp-pg-events migrate`" in said

    query(migrated, "DELETE FROM alembic_version")
    said = await refusal(migrated, SchemaTooOld, caplog)
    assert "none" in said and NEEDS in said and "`mcp-pg-events migrate`" in said

    query(migrated, "INSERT INTO alembic_version VALUES ('9999')")
    query(migrated, "UPDATE settings SET oldest_worker = '9998'")
    said = await refusal(migrated, WorkerTooOld, caplog)
    assert all(part in said for part in ("9999", "9998", REVISION, "`pip install --upgrade mcp-pg-events`"))

    # Newer, and it serves workers as old as this one: old and new run side by side during an upgrade.
    query(migrated, "UPDATE settings SET oldest_worker = %s", REVISION)
    async with PostgresStore(migrated) as store:
        await open_session(store)


async def test_who_was_refused_leaves_neither_connections_nor_a_worker_behind(
    migrated: str, caplog: pytest.LogCaptureFixture
) -> None:
    query(migrated, "UPDATE settings SET oldest_worker = '9998'")
    await refusal(migrated, WorkerTooOld, caplog)
    query(migrated, "UPDATE settings SET oldest_worker = %s", REVISION)
    await refusal(migrated, DatabaseUnavailable, caplog, listen_dsn=dsn_url(migrated, dbname="no_such_database"))
    await until(lambda: backends(migrated) == 0)
    assert query(migrated, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]


def backends(dsn: str) -> int:
    """How many connections there are to the database from stores."""
    with psycopg.connect(dsn, application_name="the test") as connection:
        row = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name = 'mcp_pg_events'",
            (database_name(dsn),),
        ).fetchone()
    assert row is not None
    return int(row[0])


# Options


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("outage_timeout", value) for value in (0, -1, math.nan, math.inf)),
        *(("drain_timeout", value) for value in (-1, math.nan, math.inf)),
        *(("unresponsive_timeout", value) for value in (0, 5, math.nan, math.inf)),
        *(("max_connections", value) for value in (0, -1)),
        ("prepare_threshold", -1),
        *(("schema", value) for value in ("", "pg_mine", "information_schema", "x" * 64, "a\0b", "a\nb")),
    ],
)
def test_an_option_that_cannot_work_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=option):
        PostgresStore("postgresql://host/database", **{option: value})


def test_options_are_given_by_name_alone() -> None:
    with pytest.raises(TypeError):
        PostgresStore("postgresql://host/database", "postgresql://host/database")  # type: ignore[misc]


async def test_a_worker_keeps_to_its_connections(migrated: str) -> None:
    """The pool's, and four more: one each to open streams, to write, to wake, and to listen."""
    async with PostgresStore(migrated, max_connections=2, prepare_threshold=None) as store:
        key, _ = await open_session(store)
        streams = await asyncio.gather(*(open_call(store, key, number) for number in range(1, 40)))
        await asyncio.gather(*(store.log.append(stream, NOTE) for stream in streams))
        held = await asyncio.gather(*(store.log.attach(key, stream.number, 1, patience=10) for stream in streams))
        assert len(held) == 39
        assert 4 < backends(migrated) <= 2 + 4
    await until(lambda: backends(migrated) == 0)


async def test_a_store_may_be_entered_several_times_and_is_one_worker(migrated_once: str) -> None:
    store = PostgresStore(migrated_once)
    async with store:
        number = store.worker_number()
        async with store, store:
            assert store.worker_number() == number
        await open_session(store)
    with pytest.raises(StoreClosed):
        store.worker_number()
    async with store:
        assert store.worker_number() != number, "a number is never used again"


# Several schemas


async def test_two_schemas_in_one_database_do_not_meet(migrated: str) -> None:
    second = 'Second "schema" %s'
    upgrade(migrated, schema=second)
    async with contextlib.AsyncExitStack() as stack:
        (here,) = await stack.enter_async_context(running(migrated, 1))
        (there,) = await stack.enter_async_context(running(migrated, 1, schema=second))
        # The same numbers on both sides: only the schema tells them apart.
        assert here.worker_number() == there.worker_number()
        key, opened = await open_session(here)
        other_key, other_opened = await open_session(there)
        assert opened.standalone == other_opened.standalone
        for stranger, foreign in ((here, other_key), (there, key)):
            with pytest.raises(SessionUnknown):
                await stranger.log.find_session(foreign)
        stream, other_stream = await open_call(here, key), await open_call(there, other_key)
        assert stream.number == other_stream.number
        await here.log.append(stream, NOTE)
        await here.log.append(standalone(key, opened), NOTE)
        held = await there.log.attach(other_key, other_stream.number, 0, patience=1)
        assert (await there.log.read(other_stream.number, 0, held.bound)).events == []
        assert stored(migrated, stream.number) == [(1, NOTE)]
        # Locks and channels belong to the whole database: neither judges the other's workers, nor hears of its streams.
        for store in (here, there):
            assert await parts(store).finisher.suspects(60) == []
        assert parts(here).waker._prefix != parts(there).waker._prefix
        # A worker that is dead here is not kept alive by the lock of its namesake there.
        await stack.enter_async_context(running(migrated, 1, schema=second))
        statement = "INSERT INTO workers (host, pid, revision, seen_at) SELECT 'h', 1, %s, now() - interval '1 hour'"
        query(migrated, statement + " RETURNING number", REVISION)
        locks = "SELECT count(DISTINCT (classid, objid)), count(DISTINCT objid) FROM pg_locks"
        mine = " WHERE database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        assert query(migrated, locks + mine + " AND locktype = 'advisory' AND granted") == [(3, 2)]
        assert [suspect.number for suspect in await parts(here).finisher.suspects(10**6)] == [2]
