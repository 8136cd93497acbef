"""What retention must never do: drop what nobody let go of, write over an archive, or hold appends up."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from psycopg import sql
from psycopg.conninfo import make_conninfo

from mcp_pg_events import chores, migrate, retention, telemetry
from mcp_pg_events.archive import archive
from mcp_pg_events.errors import ConfigurationError, NotMigrated
from mcp_pg_events.retention import MARK, Report
from tests.support.ageing import DAYS, age
from tests.support.command import mcp_pg_events, without_settings
from tests.support.log import partitions, query, running, until
from tests.support.retaining import appending, detach_and_give_up, reading, results

WEEK = timedelta(days=7)
TRY_AGAIN = 75


def run(dsn: str, ttl: timedelta | None = WEEK, **arguments: Any) -> Report:
    return retention.run(dsn, schema="mcp_events", ttl=ttl, **arguments)


def command(dsn: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`mcp-pg-events retention` as cron runs it."""
    return subprocess.run(
        [sys.executable, "-m", "mcp_pg_events", "retention", "--dsn", dsn, *options],
        env=without_settings(),
        capture_output=True,
        text=True,
        timeout=60,
    )


def count(dsn: str, name: str) -> int:
    return int(query(dsn, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(name)))[0][0])


def bounds(dsn: str, name: str) -> tuple[str, str]:
    """The lower and upper bound of a partition."""
    [found] = query(
        dsn,
        "SELECT b[1], b[2] FROM pg_class c, regexp_match(pg_get_expr(c.relpartbound, c.oid), "
        "'FROM \\(''(.*)''\\) TO \\(''(.*)''\\)') b WHERE c.oid = ('mcp_events.' || %s)::regclass",
        name,
    )
    return found


def marked(dsn: str) -> list[str]:
    rows = query(dsn, "SELECT relname FROM pg_class WHERE obj_description(oid, 'pg_class') = %s ORDER BY relname", MARK)
    return [name for (name,) in rows]


# --- a ttl that only looks like one -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", ["-1000 months 30001 days", "23 hours", "-7 days", "0", "36500 days"])
def test_a_ttl_that_reaches_less_than_a_partition_back_drops_nothing(migrated: str, ttl: str) -> None:
    age(migrated, events=100)
    with pytest.raises(psycopg.errors.InvalidParameterValue):
        query(migrated, "SELECT * FROM drop_expired(%s::interval)", ttl)
    assert len(partitions(migrated)) == DAYS + 3


def test_a_month_is_28_days_at_least_to_the_function_as_to_the_command(migrated: str) -> None:
    query(migrated, "UPDATE settings SET partition_interval = 'month'")
    for refused in ("27 days", "27 days 23:59:59"):
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            query(migrated, "SELECT * FROM drop_expired(%s::interval)", refused)
    for taken in ("28 days", "1 month"):
        assert query(migrated, "SELECT * FROM drop_expired(%s::interval)", taken) == []
    with pytest.raises(ConfigurationError):
        run(migrated, timedelta(days=27))
    run(migrated, timedelta(days=28))


@pytest.mark.parametrize("ttl", ["36500d", "9999w", "999999d"])
def test_a_ttl_of_a_century_is_a_mistake_of_whoever_typed_it(migrated: str, ttl: str) -> None:
    ran = mcp_pg_events("retention", "--dsn", migrated, "--ttl", ttl)
    assert ran.code == 2
    assert "a hundred years" in ran.err and "Traceback" not in ran.err


# --- what somebody else detaches --------------------------------------------------------------------------------------


def test_a_partition_that_somebody_else_detaches_is_kept(migrated: str) -> None:
    age(migrated, events=1200)
    name = partitions(migrated)[1]  # the oldest has no events
    detach_and_give_up(migrated, name)
    events = count(migrated, name)
    assert events > 0
    report = run(migrated)
    assert [outcome.result for outcome in report.partitions if outcome.name == name] == ["pending"]
    assert count(migrated, name) == events
    # Only one partition can be on its way at a time.
    assert results(report) == {"pending": 1, "contended": 4, "kept": 10}
    assert marked(migrated) == [], "whoever detaches one of the others now may want to keep it"
    ran = command(migrated, "--ttl", "7d")
    assert (ran.returncode, ran.stderr) == (TRY_AGAIN, "")
    assert f"pending    {name}" in ran.stdout
    with psycopg.connect(migrated, autocommit=True) as dba:
        dba.execute(
            sql.SQL("ALTER TABLE mcp_events.events DETACH PARTITION mcp_events.{} FINALIZE").format(
                sql.Identifier(name)
            )
        )
    assert results(run(migrated)) == {"dropped": 4, "kept": 10}
    assert count(migrated, name) == events


def test_one_that_somebody_detaches_while_a_pass_gets_to_it_is_kept(
    migrated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    age(migrated, events=1200)
    name = partitions(migrated)[1]
    with monkeypatch.context() as patched:
        patched.setattr(retention._Pass, "_do", _before(retention._Pass._do, "DETACH PARTITION", migrated, name))
        assert results(run(migrated)) == {"missing": 1, "dropped": 4, "kept": 10}
    assert results(run(migrated)) == {"kept": 10}
    assert count(migrated, name) > 0


def _before(do: Any, part: str, dsn: str, name: str) -> Any:
    """`_do`, before whose first statement with `part` a DBA detaches a partition."""

    def done(self: Any, statement: str, *values: Any, **options: Any) -> Any:
        if part in statement and name in partitions(dsn):
            query(dsn, sql.SQL("ALTER TABLE mcp_events.events DETACH PARTITION {}").format(sql.Identifier(name)))
        return do(self, statement, *values, **options)

    return done


def test_the_guides_way_of_keeping_a_partition_keeps_it(migrated: str) -> None:
    age(migrated, events=1200)
    name = partitions(migrated)[1]
    _, upper = bounds(migrated, name)
    events = count(migrated, name)
    page = (Path(__file__).parents[2] / "docs/how-to/retention.md").read_text(encoding="utf-8")
    section = page.partition("## Keep a partition")[2]
    statements = section.partition("```sql\n")[2].partition("```")[0]
    statements = statements.replace("events_p2026112600", name).replace("2026-11-27 00:00+00", upper)
    with psycopg.connect(migrated, autocommit=True) as dba:
        for statement in statements.split(";")[:-1]:
            dba.execute(statement)  # type: ignore[call-overload]  # text of the page
    assert results(run(migrated)) == {"dropped": 4, "kept": 10}
    assert [result for _, result in query(migrated, "SELECT * FROM drop_expired('7 days')")] == []
    assert count(migrated, name) == events > 0


def test_the_mark_of_a_pass_that_was_killed_goes_where_the_partition_is_to_stay(migrated: str) -> None:
    age(migrated, events=100)
    name = partitions(migrated)[-4]
    query(migrated, sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.Identifier(name), MARK))
    run(migrated, dry_run=True)
    assert marked(migrated) == [name]
    run(migrated)
    assert marked(migrated) == []


# --- archives ---------------------------------------------------------------------------------------------------------


def test_two_schemas_do_not_write_over_each_others_archives(migrated: str, tmp_path: Path) -> None:
    age(migrated, events=1200)
    migrate.upgrade(migrated, schema="other")
    with psycopg.connect(migrated, autocommit=True) as connection:
        for name in partitions(migrated)[1:5]:
            connection.execute(
                sql.SQL("CREATE TABLE other.{0} (LIKE mcp_events.{0} INCLUDING ALL)").format(sql.Identifier(name))
            )
            lower, upper = bounds(migrated, name)
            connection.execute(
                sql.SQL("ALTER TABLE other.events ATTACH PARTITION other.{} FOR VALUES FROM ({}) TO ({})").format(
                    sql.Identifier(name), lower, upper
                )
            )
    assert results(run(migrated, archive_to=tmp_path)) == {"dropped": 5, "kept": 10}
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigurationError, match="exists already, with other events"):
        retention.run(migrated, schema="other", ttl=WEEK, archive_to=tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert query(migrated, "SELECT count(*) FROM pg_inherits WHERE inhparent = 'other.events'::regclass") == [(7,)]
    ran = command(migrated, "--schema", "other", "--ttl", "7d", "--archive", str(tmp_path))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "a directory of its own" in ran.stderr and "Traceback" not in ran.stderr


def test_an_archive_that_a_killed_pass_has_finished_is_no_obstacle_and_a_torn_one_is(
    migrated: str, tmp_path: Path
) -> None:
    age(migrated, events=1200)
    name = partitions(migrated)[1]
    with psycopg.connect(migrated, autocommit=True) as connection:
        path = archive(connection, "mcp_events", name, tmp_path)
        assert archive(connection, "mcp_events", name, tmp_path) == path
        assert len(gzip.open(path).readlines()) == count(migrated, name)
        whole = path.read_bytes()
        for torn in (whole[:-20], b"nothing that gzip knows"):
            path.write_bytes(torn)
            with pytest.raises(ConfigurationError):
                archive(connection, "mcp_events", name, tmp_path)
            assert path.read_bytes() == torn
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# --- without a ttl ----------------------------------------------------------------------------------------------------


def test_without_a_ttl_not_even_what_an_earlier_pass_began_goes(migrated: str) -> None:
    age(migrated, events=1200)
    first, second = partitions(migrated)[:2]
    query(migrated, sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.Identifier(first), MARK))
    query(migrated, sql.SQL("ALTER TABLE events DETACH PARTITION {}").format(sql.Identifier(first)))
    with reading(migrated):
        run(migrated)
    assert marked(migrated) == [first, second] or marked(migrated) == [second]
    standing = query(migrated, "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'events_p%%'")
    ran = command(migrated)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "No --ttl was given, so nothing is dropped." in ran.stdout
    assert query(migrated, "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'events_p%%'") == standing
    assert run(migrated).contended is False
    assert query(migrated, "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'events_p%%'") == [(10,)]


# --- an earlier revision --------------------------------------------------------------------------------------------


def test_a_database_of_an_earlier_revision_is_told_before_anything_is_marked(migrated: str) -> None:
    age(migrated)
    query(migrated, "DROP FUNCTION raise_floors(regclass, timestamptz, bigint, integer)")
    with pytest.raises(NotMigrated, match="run `mcp-pg-events migrate`"):
        run(migrated)
    assert marked(migrated) == []


# --- locks and settings -----------------------------------------------------------------------------------------------


@contextmanager
def holding(dsn: str, statement: str) -> Iterator[None]:
    with psycopg.connect(dsn) as connection:
        connection.execute("SET search_path = mcp_events")
        connection.execute(statement)  # type: ignore[call-overload]  # text of this module
        yield
        connection.rollback()


def test_a_lock_that_keeps_partitions_from_being_made_is_for_the_next_pass(migrated: str) -> None:
    age(migrated, events=100)
    query(migrated, sql.SQL("DROP TABLE {}").format(sql.Identifier(partitions(migrated)[-1])))
    with holding(migrated, "LOCK TABLE events IN SHARE UPDATE EXCLUSIVE MODE"):
        ran = command(migrated, "--ttl", "7d", "--json")
        assert (ran.returncode, ran.stderr) == (TRY_AGAIN, "")
        said = json.loads(ran.stdout)
        assert (said["locked"], said["contended"], said["created"]) == (True, True, 0)
        ran = command(migrated, "--ttl", "7d")
        assert ran.returncode == TRY_AGAIN
        assert "Somebody holds a lock" in ran.stdout
    report = run(migrated)
    assert (report.created, report.locked, report.contended) == (1, False, False)
    assert results(report) == {"dropped": 5, "kept": 10}


def test_a_lock_that_keeps_a_pass_from_going_on_is_for_the_next_one(migrated: str) -> None:
    with holding(migrated, "LOCK TABLE settings"):
        ran = command(migrated, "--ttl", "7d")
    assert (ran.returncode, ran.stderr) == (TRY_AGAIN, "")
    assert "Somebody holds a lock" in ran.stdout


def test_a_role_with_other_dates_and_another_time_zone_drops_the_same(migrated: str) -> None:
    age(migrated, events=1200)
    foreign = make_conninfo(migrated, options="-c datestyle=German -c timezone=Asia/Kathmandu")
    assert results(run(foreign)) == {"dropped": 5, "kept": 10}


def test_a_pass_that_met_a_reader_exits_with_75_and_the_next_with_0(migrated: str) -> None:
    age(migrated, events=1200)
    with reading(migrated):
        ran = command(migrated, "--ttl", "7d")
        assert (ran.returncode, ran.stderr) == (TRY_AGAIN, "")
        assert f"contended  {partitions(migrated)[0]}" in ran.stdout
    ran = command(migrated, "--ttl", "7d")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "dropped " in ran.stdout


@pytest.mark.slow
def test_a_reader_in_a_transaction_for_a_minute_holds_up_nobody_but_the_pass(migrated: str) -> None:
    age(migrated, events=1200)
    began = time.monotonic()
    passes = 0
    with appending(migrated) as took:
        with reading(migrated):
            while time.monotonic() - began < 60:
                ran = command(migrated, "--ttl", "7d")
                assert (ran.returncode, ran.stderr) == (TRY_AGAIN, "")
                assert "contended  events_p" in ran.stdout
                passes += 1
                assert [result for _, result in query(migrated, "SELECT * FROM drop_expired('7 days')")]
        ran = command(migrated, "--ttl", "7d")
    assert ran.returncode == 0
    assert passes > 5
    assert max(took) < 0.25, f"an append waited {max(took):.3f} s"
    print(f"{len(took)} appends beside {passes} passes, the slowest {1000 * max(took):.0f} ms")
    assert query(migrated, "SELECT count(*) FROM pg_inherits WHERE inhdetachpending") == [(0,)]
    assert len(partitions(migrated)) == 10


# --- what the function and the workers say ----------------------------------------------------------------------------


def test_the_function_says_what_is_being_detached(migrated: str) -> None:
    age(migrated, events=1200)
    first, name, *others = partitions(migrated)[:5]
    detach_and_give_up(migrated, name)
    rows = query(migrated, "SELECT * FROM drop_expired('7 days')")
    assert rows == [(name, "detach pending"), *((other, "dropped") for other in (first, *others))]
    assert query(migrated, "SELECT * FROM drop_expired('7 days')") == [(name, "detach pending")]
    assert count(migrated, name) > 0


@pytest.mark.anyio
async def test_an_elected_worker_records_what_it_let_go(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[float, dict[str, int], dict[str, int]]] = []
    monkeypatch.setattr(chores, "RETENTION_FIRST", 0.05)
    monkeypatch.setattr(
        telemetry,
        "retention",
        lambda seconds, *, partitions, rows: recorded.append((seconds, dict(partitions), dict(rows))),
    )
    age(migrated, events=24)
    query(
        migrated,
        "INSERT INTO workers (host, pid, revision, ended_at) VALUES ('h', 1, '0006', now() - interval '2 days')",
    )
    async with running(migrated, 1, retention=WEEK):
        await until(lambda: any(rows for _, _, rows in recorded))
    # Where something else of the worker's read events in that moment, it was contended, and tried again.
    steps = [(found, rows) for _, found, rows in recorded if "contended" not in found]
    assert steps == [({"dropped": 5}, {}), ({}, {"workers": 1})]
    assert all(0 < seconds < 10 for seconds, _, _ in recorded)


def test_a_pass_has_a_span(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(telemetry, "_tracer", provider.get_tracer(telemetry.SCOPE))
    ran = mcp_pg_events("retention", "--dsn", migrated, "--ttl", "7d")
    assert ran.code == 0
    assert [span.name for span in exporter.get_finished_spans()] == ["mcp_pg_events.retention"]
