"""The role of a worker, which owns nothing: what it can do, and that it can do nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from mcp_pg_events import migrate
from mcp_pg_events.schema import REVISION
from tests.support.command import mcp_pg_events
from tests.support.roles import login_role
from tests.support.schemas import query


@pytest.fixture
def worker(migrated: str) -> Iterator[str]:
    """A role with the least privileges, as a DSN."""
    with login_role(migrated) as (role, dsn):
        migrate.upgrade(migrated, worker_role=role)
        yield dsn


def test_the_least_privileged_role_can_do_a_worker_s_work(worker: str) -> None:
    query(worker, "INSERT INTO workers (host, pid, revision) VALUES ('h', 1, '0001')")
    query(worker, "SELECT number FROM workers FOR UPDATE")
    query(worker, "INSERT INTO sessions (id, server) VALUES ('s', 'x')")
    query(worker, "INSERT INTO streams (session_id, request_key) VALUES ('s', '1')")
    query(worker, "UPDATE streams SET final_seq = 1")
    query(worker, "INSERT INTO events (stream, seq, payload) VALUES (1, 1, '{}')")
    query(worker, "INSERT INTO inbox (worker, session_id, payload) VALUES (1, 's', '{}')")
    for table in ("inbox", "streams", "sessions", "workers"):
        with psycopg.connect(worker) as connection:
            connection.execute(sql.SQL("DELETE FROM mcp_events.{}").format(sql.Identifier(table)))
    assert query(worker, "SELECT payload FROM events") == ["{}"]
    assert query(worker, "SELECT version_num FROM alembic_version") == [REVISION]
    assert query(worker, "SELECT oldest_worker FROM settings") == ["0001"]
    assert query(worker, "SELECT ensure_partitions(6)") == [4]


@pytest.mark.parametrize(
    "statement",
    [
        "DROP TABLE events",
        "ALTER TABLE events ADD COLUMN x text",
        "DELETE FROM events",
        "UPDATE events SET payload = 'x'",
        "TRUNCATE events",
        "UPDATE settings SET oldest_worker = '9999'",
        "UPDATE alembic_version SET version_num = '0000'",
        "CREATE TABLE mine (id integer)",
        "CREATE OR REPLACE FUNCTION ensure_partitions(ahead integer DEFAULT 2) RETURNS integer RETURN 1",
        "DROP FUNCTION ensure_partitions(integer)",
        "DO $$ BEGIN EXECUTE (SELECT format('SELECT * FROM %s', min(inhrelid)::regclass) FROM pg_inherits); END $$",
    ],
)
def test_the_least_privileged_role_can_do_nothing_else(worker: str, statement: LiteralString) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        query(worker, statement)


def test_a_worker_s_temporary_tables_do_not_reach_the_function_that_runs_as_the_owner(worker: str) -> None:
    with psycopg.connect(worker, autocommit=True) as connection:
        connection.execute("CREATE TEMPORARY TABLE settings (partition_interval text)")
        connection.execute("CREATE TEMPORARY TABLE events (created_at timestamptz) PARTITION BY RANGE (created_at)")
        connection.execute("SET search_path = pg_temp, mcp_events")
        assert connection.execute("SELECT mcp_events.ensure_partitions(3)").fetchone() == (1,)
        owners = connection.execute("SELECT count(*) FROM pg_inherits WHERE inhparent = 'events'::regclass").fetchone()
        assert owners == (0,)


def test_a_role_that_does_not_exist_is_named_with_what_to_do(database: str) -> None:
    ran = mcp_pg_events("migrate", "--worker-role", "nobody here", MCP_PG_EVENTS_DSN=database)
    assert ran.code == 1
    assert ran.err == (
        "mcp-pg-events: Schema mcp_events is migrated, but there is no role 'nobody here' to grant anything to: "
        "CREATE ROLE it, and run this again.\n"
    )
    assert migrate.current(database) == REVISION


def test_a_role_without_the_grant_cannot_make_partitions(migrated: str, worker: str) -> None:
    role = sql.Identifier(str(conninfo_to_dict(worker)["user"]))
    with psycopg.connect(migrated, autocommit=True) as admin:
        revoke = sql.SQL("REVOKE EXECUTE ON FUNCTION mcp_events.ensure_partitions(integer) FROM {}")
        admin.execute(revoke.format(role))
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        query(worker, "SELECT ensure_partitions()")


def test_the_script_for_a_dba_grants_the_role_too(database: str) -> None:
    script = migrate.render(schema='we"ird', worker_role='r"ole', partition_interval="month")
    assert 'GRANT USAGE ON SCHEMA "we""ird" TO "r""ole"' in script
    assert "VALUES ('month', '0001')" in script
