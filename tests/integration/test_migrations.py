"""The schema: made, checked, rendered, removed, and beside others in one database."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.util import CommandError
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from mcp_pg_events import migrate
from mcp_pg_events.errors import ConfigurationError, DatabaseUnavailable, Error, WorkerTooOld
from mcp_pg_events.partitions import Partition, floor
from mcp_pg_events.schema import NEEDS, REVISION
from mcp_pg_events.tables import METADATA
from tests.support.command import alembic_in_checkout, mcp_pg_events, without_settings
from tests.support.roles import login_role
from tests.support.schemas import partitions, query

ROOT = Path(__file__).parents[2]

ODD_NAMES = ['it\'s "we"ird": :c %s %% {x} back\\slash \\:x', "$mcp_pg_events$ schéma", "select", "x" * 63]


def relations(dsn: str) -> list[str]:
    """Everything in the database that initdb did not make."""
    return query(
        dsn,
        """SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
           WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
           UNION ALL SELECT n.nspname || '.' || p.proname || '()' FROM pg_proc p
           JOIN pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
           UNION ALL SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
           ORDER BY 1""",
    )


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a Python module as a user would, with nothing of this process's settings."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=without_settings(**environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_migration_makes_the_tables_and_the_first_partitions(database: str) -> None:
    migrate.upgrade(database)

    assert migrate.current(database) == REVISION
    assert query(database, "SELECT oldest_worker FROM settings") <= [NEEDS]
    today = floor(query(database, "SELECT now()")[0], "day")
    made = [Partition(today + timedelta(days=day), today + timedelta(days=day + 1)) for day in range(3)]
    assert partitions(database) == made
    assert query(database, "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'events'::regclass") == [
        partition.name for partition in made
    ]
    query(database, "INSERT INTO events (stream, seq, payload) VALUES (1, 1, '{}')")


def test_every_table_says_what_it_is_for(migrated: str) -> None:
    without = query(
        migrated,
        """SELECT relname::text FROM pg_class
           WHERE relname = ANY(%(names)s) AND obj_description(oid, 'pg_class') IS NULL""",
        names=list(METADATA.tables),
    )
    assert without == []


def test_check_is_clean_with_partitions_present_and_notices_a_change(
    migrated: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = migrate.Target(migrated)
    assert len(partitions(migrated)) == 3
    command.check(target.config())

    for change in (
        "ALTER TABLE sessions DROP COLUMN owner",
        "DROP INDEX streams_open",
        "ALTER TABLE streams ALTER floor DROP DEFAULT",
        "COMMENT ON TABLE inbox IS 'changed'",
    ):
        with psycopg.connect(migrated) as connection:
            connection.execute("SET search_path = mcp_events")
            connection.execute(change)
        with pytest.raises(CommandError, match="New upgrade operations"):
            command.check(target.config())
        migrate.downgrade(migrated, revision="base")
        migrate.upgrade(migrated)
    command.check(target.config())


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_schema_may_have_any_name_that_postgresql_takes(database: str, name: str) -> None:
    before = relations(database)
    migrate.upgrade(database, schema=name)
    migrate.upgrade(database, schema=name)  # nothing to do
    command.check(migrate.Target(database, name).config())
    assert query(database, "SELECT ensure_partitions(4)", name) == [2]
    assert {line.rpartition(".")[0] or line for line in relations(database)} == {"public", name}
    migrate.downgrade(database, schema=name, revision="base")
    assert relations(database) == before

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(migrate.render(schema=name).encode())
    assert migrate.current(database, schema=name) == REVISION
    command.check(migrate.Target(database, name).config())
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(migrate.render(schema=name, down=True, revision="base").encode())
    assert relations(database) == before


@pytest.mark.parametrize("name", ["", "x" * 64, "é" * 32, "a\0b", "line\nbreak", "pg_mine", "information_schema"])
def test_a_name_that_postgresql_would_refuse_or_cut_is_refused_first(name: str) -> None:
    with pytest.raises(ConfigurationError, match="schema's name"):
        migrate.render(schema=name)


def test_two_schemas_in_one_database_do_not_meet(database: str) -> None:
    migrate.upgrade(database, schema="one", partition_interval="hour")
    migrate.upgrade(database, schema="two")
    query(database, "INSERT INTO sessions (id, server) VALUES ('s', 'x')", "one")
    query(database, "INSERT INTO events (stream, seq, payload) VALUES (1, 1, 'x')", "one")
    assert query(database, "SELECT id FROM sessions", "two") == []
    assert query(database, "SELECT payload FROM events", "two") == []
    assert query(database, "SELECT partition_interval FROM settings", "two") == ["day"]
    assert query(database, "SELECT ensure_partitions(3)", "one") == [1]
    assert len(partitions(database, "two")) == 3

    command.check(migrate.Target(database, "one").config())
    migrate.downgrade(database, schema="one", revision="base")
    command.check(migrate.Target(database, "two").config())
    assert query(database, "SELECT ensure_partitions(3)", "two") == [1]


def test_two_migrations_at_once_both_succeed(database: str) -> None:
    name = sql.Identifier(str(conninfo_to_dict(database)["dbname"]))
    with psycopg.connect(database, autocommit=True) as admin:
        admin.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_isolation = serializable").format(name))

    def migrate_in_a_process() -> subprocess.CompletedProcess[str]:
        return run("mcp_pg_events", "migrate", MCP_PG_EVENTS_DSN=database)

    with ThreadPoolExecutor(2) as pool, psycopg.connect(database) as gate:
        gate.execute("LOCK TABLE pg_namespace IN SHARE MODE")  # CREATE SCHEMA waits here
        running = [pool.submit(migrate_in_a_process) for _ in range(2)]
        try:
            wait_for_lock_waiters(database, 2)
        finally:
            gate.rollback()
        for done in running:
            assert done.result().returncode == 0, done.result().stderr
    assert migrate.current(database) == REVISION


def test_two_threads_may_migrate(database: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: migrate.upgrade(database, schema=name), ["one", "two"]))
    assert [migrate.current(database, schema=name) for name in ("one", "two")] == [REVISION, REVISION]


def wait_for_lock_waiters(dsn: str, number: int) -> None:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    deadline = time.monotonic() + 20
    while query(dsn, waiting) != [number]:
        assert time.monotonic() < deadline, "they do not wait"
        time.sleep(0.02)


def test_a_schema_that_an_earlier_version_made_can_be_downgraded(database: str) -> None:
    """Its functions of revision 0003 to 0008 were fewer."""
    migrate.upgrade(database, revision="0006")
    query(database, "DROP FUNCTION close_standalone(text)")
    migrate.downgrade(database, revision="base")


def test_a_downgrade_leaves_what_it_did_not_make(database: str) -> None:
    query(database, "CREATE SCHEMA mcp_events")
    migrate.upgrade(database)
    migrate.downgrade(database, revision="base")
    assert "mcp_events" in relations(database), "a schema that was there before"
    query(database, "DROP SCHEMA mcp_events")

    migrate.upgrade(database)
    query(database, "CREATE TABLE mine (id integer)")
    migrate.downgrade(database, revision="base")
    assert [name for name in relations(database) if name.startswith("mcp_events")] == ["mcp_events", "mcp_events.mine"]
    migrate.downgrade(database, revision="base")  # and there is nothing to do


def test_alembic_s_own_command_does_the_same(database: str) -> None:
    settings = {"MCP_PG_EVENTS_DSN": database, "MCP_PG_EVENTS_SCHEMA": "from_env"}
    done = run("alembic", "upgrade", "head", **settings)
    assert done.returncode == 0, done.stderr
    assert migrate.current(database, schema="from_env") == REVISION
    for arguments in (["check"], ["upgrade", "head"], ["downgrade", "base"]):
        ran = alembic_in_checkout(*arguments, **settings)
        assert ran.code == 0, ran
    assert migrate.current(database, schema="from_env") is None

    options = ("-x", f"dsn={database}", "-x", "schema=a b", "-x", "partition_interval=week")
    assert alembic_in_checkout(*options, "upgrade", "head").code == 0
    assert query(database, "SELECT partition_interval FROM settings", "a b") == ["week"]
    assert alembic_in_checkout(*options, "check").code == 0
    script = alembic_in_checkout("-x", "schema=a b", "upgrade", "head", "--sql").out
    assert 'CREATE SCHEMA "a b"' in script
    assert script == migrate.render(schema="a b")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "postgresql://localhost/app."),
        (["-x", "shema=x"], "Unknown -x argument: shema; there are dsn, schema and partition_interval."),
        (["-x", "dsn=postgresql://u:hunter2@127.0.0.1:1/x"], "Connection refused"),
        (["-x", "dsn=hunter2 = = 'x"], "nor libpq's key=value form."),
    ],
)
def test_alembic_s_own_command_says_in_one_line_what_is_wrong(options: list[str], says: str) -> None:
    ran = alembic_in_checkout(*options, "upgrade", "head")
    assert ran.code != 0
    assert ran.out.startswith("FAILED: ")
    assert ran.out.rstrip().endswith(says)
    assert len(ran.out.splitlines()) == 1
    assert "hunter2" not in ran.out + ran.err


def test_a_conninfo_string_is_as_good_as_a_uri(database: str) -> None:
    migrate.upgrade(make_conninfo(database))
    assert migrate.current(make_conninfo(database)) == REVISION


# Errors


def test_a_schema_newer_than_the_package_is_named_as_such(migrated: str) -> None:
    query(migrated, "UPDATE alembic_version SET version_num = '0999'")
    with pytest.raises(WorkerTooOld, match=rf"'0999'.*'{REVISION}'.*upgrade the package"):
        migrate.upgrade(migrated)


def test_a_role_without_rights_is_told_about_the_script(database: str) -> None:
    refused = pytest.raises(Error, match=r"lacks a right: permission denied for database .*--sql")
    with login_role(database) as (_, as_role), refused:
        migrate.upgrade(as_role)


def test_a_wrong_address_is_one_sentence_without_the_password() -> None:
    for dsn in ("postgresql://u:hunter2@127.0.0.1:1/x", "host=127.0.0.1 port=1 password=hunter2", "hunter2 = = 'x"):
        ran = mcp_pg_events("migrate", "--dsn", dsn)
        assert ran.code == 1
        assert len(ran.err.strip().splitlines()) == 1
        assert ran.err.startswith("mcp-pg-events: ")
        assert "hunter2" not in ran.err + ran.out
    with pytest.raises(DatabaseUnavailable, match="Connection refused"):
        migrate.upgrade("host=127.0.0.1 port=1")
