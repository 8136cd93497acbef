"""`mcp-pg-events stats`: what it counts, what it estimates, and that it says which."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from psycopg.sql import SQL, Identifier

from mcp_pg_events.migrate import upgrade
from tests.support.ageing import age
from tests.support.command import mcp_pg_events
from tests.support.log import NOTE, open_call, open_session, partitions, query, running
from tests.support.retaining import detach_and_give_up
from tests.support.roles import login_role

pytestmark = pytest.mark.anyio


def stats(dsn: str) -> Any:
    ran = mcp_pg_events("stats", "--json", MCP_PG_EVENTS_DSN=dsn)
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


def shown(dsn: str) -> str:
    ran = mcp_pg_events("stats", MCP_PG_EVENTS_DSN=dsn)
    assert (ran.code, ran.err) == (0, "")
    return ran.out


async def test_it_counts_partitions_sessions_calls_readers_and_workers(migrated: str) -> None:
    age(migrated, days=3, events=300)
    async with running(migrated, 2) as (store, other):
        key, _ = await open_session(store)
        call = await open_call(store, key)
        await store.log.append(call, NOTE)
        await other.log.attach(key, call.number, 1, patience=5)
        gone, _ = await open_session(store)
        await store.log.end_session(gone, "deleted")
        found = await asyncio.to_thread(_collected, migrated)
        assert [each["name"] for each in found["partitions"]] == partitions(migrated)
        assert [each["events"] for each in found["partitions"]][:3] == [0, 100, 100]
        assert (found["events"], found["events_estimated"]) == (303, False)
        assert found["partitions"][1]["rate"] == round(100 / 86400, 3)
        assert [each["rate"] for each in found["partitions"][-2:]] == [None, None]
        assert found["sessions"] == {"live": 1, "live_estimated": False, "ended": 1, "ended_estimated": False}
        assert (found["calls"], found["readers"], found["standalone_readers"]) == (1, 1, 0)
        assert [(each["method"], each["calls"], each["read"]) for each in found["methods"]] == [("tools/call", 1, 1)]
        assert [(each["number"], each["alive"], each["calls"], each["readers"]) for each in found["workers"]] == [
            (store.worker_number(), True, 1, 0),
            (other.worker_number(), True, 0, 1),
        ]
        assert {each["name"] for each in found["tables"]} == {"sessions", "streams", "inbox"}
        table = shown(migrated)
        assert "1 live" in table and "1 tools/call" in table
        assert "~" not in table


def _collected(dsn: str) -> Any:
    from mcp_pg_events.cli.terminal import as_json
    from mcp_pg_events.operator.desk import open_desk
    from mcp_pg_events.operator.stats import collect

    with open_desk(dsn, "mcp_events", "stats") as desk:
        return json.loads(as_json(collect(desk)))


@pytest.mark.parametrize("analysed", [True, False])
async def test_what_is_large_is_estimated_and_says_so(
    migrated: str, monkeypatch: pytest.MonkeyPatch, analysed: bool
) -> None:
    monkeypatch.setattr("mcp_pg_events.operator.stats.COUNTED", 100_000)
    for name in partitions(migrated):
        # An ANALYZE between the two commands would change what they guess.
        query(migrated, SQL("ALTER TABLE {} SET (autovacuum_enabled = false)").format(Identifier(name)))
    query(migrated, "INSERT INTO events (stream, seq, payload) SELECT 1, n, 'x' FROM generate_series(1, 20000) n")
    query(
        migrated,
        "INSERT INTO sessions (id, server, seen_at, ended_at) SELECT md5(n::text), 'x', now() - n * interval '1 s', "
        "CASE WHEN n % 4 > 0 THEN now() END FROM generate_series(1, 20000) n",
    )
    if analysed:
        query(migrated, "ANALYZE")
        # The rest is guessed from the growth.
        query(migrated, "INSERT INTO events (stream, seq, payload) SELECT 2, n, 'x' FROM generate_series(1, 20000) n")
    else:
        query(migrated, "SELECT pg_stat_force_next_flush()")
    found = stats(migrated)
    present = next(each for each in found["partitions"] if each["events"])
    assert present["estimated"] and found["events_estimated"]
    assert found["events"] == pytest.approx(40000 if analysed else 20000, rel=0.05)
    if analysed:
        assert found["sessions"]["live_estimated"] and found["sessions"]["ended_estimated"]
        assert found["sessions"]["live"] == pytest.approx(5000, rel=0.05)
        assert found["sessions"]["ended"] == pytest.approx(15000, rel=0.05)
    assert f"~{present['events']:,}" in shown(migrated)


async def test_a_chart_and_whole_lines_for_a_pipe(migrated: str) -> None:
    age(migrated, days=60)
    query(
        migrated,
        "INSERT INTO events (stream, seq, created_at, payload) "
        "SELECT 1, n, now() - n %% 4 * interval '1 day', 'x' FROM generate_series(1, %s) n",
        100,
    )
    printed = shown(migrated)
    lines = [line.rstrip() for line in printed.splitlines()]
    assert "63 partitions" in printed
    assert "The newest 40 are shown" in printed
    assert max(line.count("█") for line in lines) == 24
    assert "\x1b" not in printed and "…" not in printed
    assert len([line for line in lines if "events_p" in line]) == 40


async def test_a_hidden_partition_counts_as_going(migrated: str) -> None:
    age(migrated, days=3, events=30)
    old = partitions(migrated)[0]
    detach_and_give_up(migrated, old)
    first = stats(migrated)["partitions"][0]
    assert (first["name"], first["going"], first["estimated"]) == (old, True, True)


async def test_no_escape_sequence_reaches_a_terminal(migrated: str) -> None:
    hostile = "\x1b[31mred\x1b[0m [bold]x :smile: \u202e \r\n"
    query(migrated, "INSERT INTO workers (host, pid, revision) VALUES (%s, 1, '0005')", hostile)
    query(
        migrated,
        "INSERT INTO streams (session_id, request_id, request_key, method) VALUES ('s', '1', 'i', %s)",
        hostile,
    )
    printed = shown(migrated)
    assert all(character.isprintable() or character == "\n" for character in printed), repr(printed)
    assert "[bold]x :smile:" in printed
    assert "no lock" in printed
    assert stats(migrated)["workers"][0]["host"] == hostile


async def test_the_role_of_a_worker_is_enough(migrated: str) -> None:
    with login_role(migrated) as (role, as_role):
        upgrade(migrated, worker_role=role)
        query(migrated, "INSERT INTO events (stream, seq, payload) VALUES (1, 1, 'x')")
        assert stats(as_role)["events"] == 1
