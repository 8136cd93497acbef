"""Letting old events go: what a pass drops, what it leaves, and that it can be killed anywhere."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mcp_pg_events import migrate, retention
from mcp_pg_events.errors import ConfigurationError, Error, NotMigrated
from mcp_pg_events.retention import Report
from tests.support.ageing import DAYS, age
from tests.support.log import partitions, query
from tests.support.retaining import appending, reading, results
from tests.support.roles import login_role

SCHEMA = "mcp_events"
WEEK = timedelta(days=7)


def run(dsn: str, ttl: timedelta | None = WEEK, **arguments: Any) -> Report:
    return retention.run(dsn, schema=SCHEMA, ttl=ttl, **arguments)


def test_what_is_older_than_the_ttl_goes_and_nothing_else(migrated: str) -> None:
    age(migrated, events=1200)
    query(migrated, "CREATE TABLE events_p2001010100 (n integer)")
    query(migrated, "CREATE TABLE somebody_elses (n integer)")
    before = query(migrated, "SELECT pg_total_relation_size(c.oid) FROM pg_class c WHERE relname LIKE 'events_p%%'")
    report = run(migrated)
    assert results(report) == {"dropped": 5, "kept": 7 + 3}
    assert [outcome.result for outcome in report.partitions[:5]] == ["dropped"] * 5
    assert all(outcome.bytes > 0 for outcome in report.partitions)
    assert query(migrated, "SELECT count(*) FROM events WHERE created_at <= now() - interval '8 days'") == [(0,)]
    assert query(migrated, "SELECT count(*) FROM events WHERE created_at > now() - interval '7 days'") == [(700,)]
    after = query(migrated, "SELECT pg_total_relation_size(c.oid) FROM pg_class c WHERE relname LIKE 'events_p%%'")
    assert len(before) - len(after) > 5, "tables and indexes are gone"
    assert query(
        migrated, "SELECT count(*) FROM pg_tables WHERE tablename IN ('events_p2001010100', 'somebody_elses')"
    ) == [(2,)]
    again = run(migrated)
    assert results(again) == {"kept": 10}
    assert not again.contended


def test_without_a_ttl_partitions_are_made_and_nothing_goes(migrated: str) -> None:
    age(migrated, events=100)
    query(migrated, "DROP TABLE mcp_events." + partitions(migrated)[-1])  # type: ignore[arg-type]  # a name of ours
    report = run(migrated, None)
    assert report.created == 1
    assert results(report) == {"kept": DAYS + 3}
    assert report.rows == {}


def test_a_rehearsal_changes_nothing(migrated: str) -> None:
    age(migrated)
    before = partitions(migrated)
    report = run(migrated, dry_run=True)
    assert results(report) == {"expired": 5, "kept": 10}
    assert partitions(migrated) == before


def test_a_reader_that_stays_makes_it_contended_and_no_append_waits(migrated: str) -> None:
    age(migrated, events=1200)
    with appending(migrated) as took:
        with reading(migrated):
            first, second = run(migrated), run(migrated)
            assert results(first) == results(second) == {"contended": 5, "kept": 10}
            assert first.contended and second.contended
            # One is hidden already.
            assert query(migrated, "SELECT count(*) FROM pg_inherits WHERE inhdetachpending") == [(1,)]
        last = run(migrated)
    assert results(last) == {"dropped": 5, "kept": 10}
    assert len(took) > 100
    assert max(took) < 0.25
    assert query(migrated, "SELECT count(*) FROM pg_inherits WHERE inhdetachpending") == [(0,)]


def test_two_at_once_step_aside(migrated: str) -> None:
    age(migrated)
    with psycopg.connect(migrated, autocommit=True) as other:
        other.execute("SET search_path = mcp_events")
        other.execute(
            "SELECT pg_advisory_lock(hashtextextended('mcp_pg_events.retention', 'events'::regclass::oid::bigint))"
        )
        report = run(migrated)
    assert (report.busy, report.contended, report.partitions) == (True, True, [])
    assert results(run(migrated))["dropped"] == 5


def killed_at(dsn: str, statement: int) -> bool:
    """Run a pass in a process that is killed before its nth statement; False when it had fewer."""

    def work() -> None:
        execute = psycopg.Connection.execute
        count = 0

        def counted(*args: Any, **arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == statement:
                os.kill(os.getpid(), signal.SIGKILL)
            return execute(*args, **arguments)

        psycopg.Connection.execute = counted  # type: ignore[method-assign]
        run(dsn)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode == -signal.SIGKILL


def test_a_pass_that_is_killed_at_any_statement_is_put_right_by_the_next(migrated: str) -> None:
    statement = 0
    killed = 0
    alive = True
    while alive:
        age(migrated, events=24)
        statement += 1
        alive = killed_at(migrated, statement)
        killed += alive
        report = run(migrated)
        assert results(report).get("kept") == 10, statement
        assert not report.contended, statement
        assert len(partitions(migrated)) == 10, statement
        left = query(
            migrated,
            "SELECT count(*) FROM pg_tables WHERE schemaname = 'mcp_events' AND tablename LIKE 'events_p%%'",
        )
        assert left == [(10,)], (statement, "a detached one was left")
        query(migrated, "SELECT ensure_partitions(2)")
        for name in partitions(migrated)[:7]:
            query(migrated, f"DROP TABLE mcp_events.{name}")  # type: ignore[arg-type]  # a name of ours
    assert killed > 20


def test_rows_go_when_nothing_refers_to_them_any_more(migrated: str) -> None:
    age(migrated)
    query(
        migrated,
        """
        INSERT INTO workers (host, pid, revision, ended_at)
        SELECT 'h', n, '0005', now() - n * interval '1 day' FROM generate_series(0, 9) n
        """,
    )
    query(
        migrated,
        """
        INSERT INTO sessions (id, server, created_at, seen_at, ended_at)
        SELECT 's' || n, 'x', now() - n * interval '1 day', now() - n * interval '1 day',
               CASE WHEN n % 2 = 0 THEN now() - n * interval '1 day' END
          FROM generate_series(0, 2999) n
        """,
    )
    query(
        migrated,
        """
        INSERT INTO streams (session_id, request_id, request_key, final_seq, created_at, ended_at)
        SELECT 's' || n, '1', 'i1', 1, now() - n * interval '1 day', now() - n * interval '1 day'
          FROM generate_series(0, 2999) n
        """,
    )
    query(
        migrated,
        "INSERT INTO inbox (worker, session_id, payload, created_at) SELECT 1, 's', '{}', now() - interval '2 days'",
    )
    report = run(migrated)
    left = {
        name: query(migrated, psycopg.sql.SQL("SELECT count(*) FROM {}").format(psycopg.sql.Identifier(name)))[0][0]
        for name in ("streams", "inbox", "workers")
    }
    # Of seven days, and the day of the partition that is kept with them.
    assert 8 <= left["streams"] <= 9
    assert left == {"streams": left["streams"], "inbox": 0, "workers": 1}
    open_sessions = query(migrated, "SELECT count(*) FROM sessions WHERE ended_at IS NULL")
    assert open_sessions == [(3,)], "those that were seen in the last seven days"
    assert report.rows["streams"] == 3000 - left["streams"]
    assert run(migrated).rows == {}


def test_an_open_session_with_a_recent_event_is_not_idle(migrated: str) -> None:
    query(migrated, "INSERT INTO sessions (id, server, seen_at) VALUES ('kept', '', now() - interval '9 days')")
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key) VALUES ('kept', '1', 'n1'), ('other', '1', 'n1')",
    )
    query(
        migrated,
        "INSERT INTO events (stream, seq, payload) SELECT number, 1, '{}' FROM streams WHERE session_id = 'kept'",
    )
    run(migrated)
    assert query(migrated, "SELECT id FROM sessions WHERE ended_at IS NULL") == [("kept",)]


def test_an_archive_has_every_event_before_its_partition_goes(migrated: str, tmp_path: Path) -> None:
    age(migrated, events=1200)
    expected = query(
        migrated,
        "SELECT stream, seq FROM events WHERE created_at < date_trunc('day', now(), 'UTC') - interval '7 days' "
        "ORDER BY 1, 2",
    )
    (tmp_path / "unfinished.jsonl.gz.part").write_bytes(b"x")
    report = run(migrated, archive_to=tmp_path)
    files = [outcome.archived for outcome in report.partitions if outcome.result == "dropped"]
    assert len(files) == 5
    lines = [json.loads(line) for file in files if file for line in gzip.open(file, "rt")]
    assert sorted((line["stream"], line["seq"]) for line in lines) == expected
    assert {line["payload"] for line in lines} == {"{}"}


def test_an_archive_that_cannot_be_written_drops_nothing(migrated: str, tmp_path: Path) -> None:
    age(migrated, events=1200)
    with pytest.raises(ConfigurationError, match="cannot be written"):
        run(migrated, archive_to=tmp_path / "nowhere")
    assert len(partitions(migrated)) == DAYS + 3


def test_the_function_for_pg_cron_does_the_same_and_holds_nobody_up(migrated: str) -> None:
    age(migrated, events=1200)
    with appending(migrated) as took:
        with reading(migrated):
            [(name, result)] = query(migrated, "SELECT * FROM drop_expired('7 days')")
            assert (name, result) == (partitions(migrated)[0], "contended")
        rows = query(migrated, "SELECT * FROM drop_expired('7 days')")
    assert [result for _, result in rows] == ["dropped"] * 5
    assert max(took) < 0.25
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        query(migrated, "SELECT * FROM drop_expired('1 hour')")
    granted = "SELECT has_function_privilege('public', 'mcp_events.drop_expired(interval, integer)', 'EXECUTE')"
    assert query(migrated, granted) == [(False,)]


def test_the_function_holds_no_append_up_while_it_removes_rows(migrated: str) -> None:
    age(migrated, events=1200)
    rows = """
        WITH made AS (INSERT INTO sessions (id, server, seen_at)
            SELECT 's' || n, 'x', now() - interval '9 days' FROM generate_series(1, 5000) n RETURNING id)
        INSERT INTO streams (session_id, created_at) SELECT id, now() - interval '9 days' FROM made
    """
    query(migrated, psycopg.sql.SQL(rows))
    steps = []
    with appending(migrated) as took:
        while step := dict(query(migrated, "SELECT * FROM drop_expired('7 days')")):
            steps.append(step)
    assert list(steps[0].values()) == ["dropped"] * 5, "rows go in another step"
    # All but the one whose stream has the number that is stored into.
    assert sum(int(step["idle sessions"]) for step in steps[1:]) == 4999
    assert max(took) < 0.25


def test_what_cannot_work_is_said_in_a_sentence(database: str, migrated: str) -> None:
    with pytest.raises(NotMigrated):
        run(database)
    with pytest.raises(ConfigurationError, match="one day long"):
        run(migrated, timedelta(hours=23))
    with login_role(migrated) as (role, as_role):
        for grant in ("GRANT USAGE ON SCHEMA mcp_events TO {}", "GRANT SELECT ON mcp_events.settings TO {}"):
            query(migrated, psycopg.sql.SQL(grant).format(psycopg.sql.Identifier(role)))
        with pytest.raises(Error, match="use the role that owns the tables"):
            run(as_role)


def test_a_new_interval_holds_for_the_partitions_to_come(migrated: str) -> None:
    migrate.upgrade(migrated, partition_interval="hour")
    assert query(migrated, "SELECT partition_interval FROM settings") == [("hour",)]
    assert run(migrated, timedelta(hours=1)).contended is False
