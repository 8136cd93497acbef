"""`mcp-pg-events doctor`: each check on a database that is well, and on one that is not."""

from __future__ import annotations

import json
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from mcp_pg_events import PostgresStore, doctor
from mcp_pg_events.doctor import Check
from tests.support.ageing import age
from tests.support.command import mcp_pg_events
from tests.support.log import query
from tests.support.postgres import PASSWORD, database_name, dsn_url
from tests.support.roles import login_role


def examine(dsn: str, schema: str = "mcp_events") -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(dsn, schema=schema)}


def configure(dsn: str, change: LiteralString) -> None:
    """ALTER DATABASE, for the connections to come."""
    query(dsn, sql.SQL("ALTER DATABASE {} " + change).format(sql.Identifier(database_name(dsn))))


def test_a_healthy_database_has_nothing_but_what_the_tests_turned_off(migrated: str) -> None:
    found = examine(migrated)
    assert {name: check.status for name, check in found.items() if check.status != "ok"} == {"durability": "warn"}
    assert found["durability"].found == "off: fsync"
    assert all((check.advice is None) == (check.status == "ok") for check in found.values())


@pytest.mark.anyio
async def test_a_running_worker_is_live_and_another_schema_has_none(migrated: str) -> None:
    async with PostgresStore(migrated):
        assert examine(migrated)["workers"] == Check("workers", "ok", "1 live")


def test_without_a_migration_it_says_so_and_goes_on_with_the_rest(database: str) -> None:
    found = examine(database, "other")
    assert found["schema"].status == "fail"
    assert "migrate` with --schema other" in (found["schema"].advice or "")
    assert found["listen"].status == "ok"
    assert "workers" not in found


@pytest.mark.parametrize(
    ("change", "name", "status", "found"),
    [
        ("UPDATE alembic_version SET version_num = '0001'", "schema", "fail", "revision 0001, but this version needs"),
        ("UPDATE settings SET oldest_worker = '9999'", "schema", "fail", "serves workers from 9999 on"),
        ("UPDATE settings SET partition_interval = 'month'", "partitions", "warn", "less than one is made ahead"),
        (
            "INSERT INTO workers (host, pid, revision, seen_at) VALUES ('gone', 1, '0005', now() - interval '2 hours')",
            "workers",
            "warn",
            "0 live, 1 silent for over 60 s (1 on gone)",
        ),
        (
            "INSERT INTO workers (host, pid, revision, seen_at) VALUES ('gone', 1, '0005', now() - interval '2 hours'),"
            " ('here', 2, '0005', now())",
            "workers",
            "fail",
            "1 live, 1 silent",
        ),
    ],
)
def test_what_is_wrong_in_the_tables_is_found(
    migrated: str, change: LiteralString, name: str, status: str, found: str
) -> None:
    query(migrated, change)
    check = examine(migrated)[name]
    assert check.status == status
    assert found in check.found
    assert check.advice


def test_a_log_that_nobody_lets_go_of_is_found(migrated: str) -> None:
    age(migrated, days=100)
    check = examine(migrated)["retention"]
    assert (check.status, check.found.partition(";")[0]) == ("warn", "the oldest of 103 partitions begins 100 days ago")


def test_partitions_that_ran_out_are_found(migrated: str) -> None:
    for (name,) in query(migrated, "SELECT inhrelid::regclass::text FROM pg_inherits"):
        if name.startswith("events_p") and not name.endswith("pkey"):
            query(migrated, sql.SQL("DROP TABLE {}").format(sql.Identifier(name)))
    check = examine(migrated)["partitions"]
    assert (check.status, check.found) == ("warn", "there is none for the present moment")


@pytest.mark.parametrize(
    ("change", "name", "status", "found"),
    [
        ("SET default_transaction_read_only = on", "connection", "fail", "transactions are read-only"),
        ("SET statement_timeout = '2s'", "time-outs", "warn", "statement_timeout = 2 s"),
        ("SET idle_in_transaction_session_timeout = 500", "time-outs", "warn", "timeout = 0.5 s"),
        ("SET synchronous_commit = off", "durability", "warn", "fsync, synchronous_commit"),
        ("CONNECTION LIMIT 5", "connections", "warn", "free under the database's CONNECTION LIMIT"),
    ],
)
def test_settings_that_bite_are_found(migrated: str, change: LiteralString, name: str, status: str, found: str) -> None:
    configure(migrated, change)
    check = examine(migrated)[name]
    assert check.status == status
    assert found in check.found
    assert check.advice


def test_a_worker_role_is_enough_and_one_without_rights_is_told_which(migrated: str) -> None:
    from mcp_pg_events.migrate import upgrade

    with login_role(migrated) as (role, as_role):
        check = examine(as_role)["schema"]
        assert (check.status, check.found) == ("fail", "the role may not read schema mcp_events")
        upgrade(migrated, worker_role=role)
        assert {check.status for name, check in examine(as_role).items() if name != "durability"} == {"ok"}
        query(migrated, sql.SQL("REVOKE INSERT ON events FROM {}").format(sql.Identifier(role)))
        check = examine(as_role)["role"]
        assert (check.status, check.found) == ("fail", "the role lacks INSERT on events")


def test_a_notification_that_does_not_come_back_fails(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LISTEN_PATIENCE", 0.1)
    other = dsn_url(migrated, dbname="postgres")  # LISTEN reaches one database alone
    found = {each.name: each for each in doctor.examine(migrated, schema="mcp_events", listen_dsn=other)}
    assert found["listen"].status == "fail"
    assert "MCP_PG_EVENTS_LISTEN_DSN" in (found["listen"].advice or "")


def test_it_ends_where_a_table_is_locked(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", "100ms")
    with psycopg.connect(migrated) as holder:
        holder.execute("LOCK TABLE mcp_events.workers IN ACCESS EXCLUSIVE MODE")
        found = examine(migrated)
    assert found["workers"].status == "fail"
    assert "canceling statement due to statement timeout" in found["workers"].found


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_exits_0_with_warnings_and_prints_json_that_parses(migrated: str) -> None:
    ran = mcp_pg_events("doctor", "--dsn", migrated, "--json")
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    assert printed["ok"] is True
    assert printed["checks"][0]["name"] == "connection"
    ran = mcp_pg_events("doctor", MCP_PG_EVENTS_DSN=migrated)
    assert ran.code == 0
    assert "warn  durability    off: fsync\n                    -> Turn it on" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_the_command_exits_1_where_something_fails(database: str) -> None:
    ran = mcp_pg_events("doctor", "--dsn", database)
    assert (ran.code, ran.err) == (1, "")
    assert "fail  schema        there is no schema mcp_events" in ran.out


def test_without_a_dsn_or_with_one_that_cannot_be_read_it_says_so_in_a_sentence() -> None:
    ran = mcp_pg_events("doctor")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("mcp-pg-events: No database was given; set MCP_PG_EVENTS_DSN")
    ran = mcp_pg_events("doctor", "--dsn", f"nonsense {PASSWORD}")
    assert (ran.code, ran.out) == (1, "")
    assert "neither a postgresql:// URI" in ran.err
    assert PASSWORD not in ran.err


@pytest.mark.parametrize("change", [{"port": 1}, {"password": "wrong-" + PASSWORD}, {"dbname": "nowhere"}])
def test_a_dsn_that_leads_nowhere_is_a_failed_check(postgres_dsn: str, change: dict[str, str | int]) -> None:
    ran = mcp_pg_events("doctor", "--json", "--dsn", dsn_url(postgres_dsn, **change))
    assert ran.code == 1
    [check] = json.loads(ran.out)["checks"]
    assert (check["name"], check["status"]) == ("connection", "fail")
    assert PASSWORD not in ran.out
