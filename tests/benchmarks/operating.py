"""The operator's commands on ten million events and 120,000 sessions.

The events are in ten partitions of a day each, a hundred to a stream, one stream to a session; a fifth of the sessions
live, and a thousand of them run a call. One session has 1,000 streams and 100,000 events: that is what `show`, `tail`,
`export`, `import` and `purge` are given. `work` is what a command does on a connection that is there; `process` is the
whole program, from its start to its end, of which Python and its imports take the most.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import psycopg

from mcp_pg_events.operator import sessions, stats, tail, transfer
from mcp_pg_events.operator.desk import Desk, open_desk
from mcp_pg_events.operator.sessions import Filter
from tests.benchmarks.environment import ROOT, Bench
from tests.benchmarks.figures import OURS, Report, percentile

TITLE = "The operator's commands"
LARGE = "large"
TIMES = 10

PARTITIONS = """
    SELECT format('CREATE TABLE mcp_events.events_p%%s PARTITION OF mcp_events.events FOR VALUES FROM (%%L) TO (%%L)',
                  to_char(day, 'YYYYMMDDHH24'), day, day + interval '1 day')
      FROM generate_series(1, 10) n, LATERAL (SELECT date_trunc('day', now()) - n * interval '1 day' AS day) days
"""
SESSIONS = """
    INSERT INTO mcp_events.sessions (id, server, owner, initialize, protocol_version, created_at, seen_at, ended_at,
                                     ended_reason)
    SELECT md5(n::text), 'server ' || n %% 3, '"owner ' || n %% 1000 || '"',
           '{"clientInfo":{"name":"x","version":"1"}}', '2025-11-25',
           now() - n * interval '7 s', now() - n * interval '7 s' * random(),
           CASE WHEN n %% 5 > 0 THEN now() - n * interval '1 s' END, CASE WHEN n %% 5 > 0 THEN 'deleted' END
      FROM generate_series(1, %(sessions)s) n
"""
STANDALONE = """
    INSERT INTO mcp_events.streams (session_id, final_seq, created_at, ended_at)
    SELECT id, CASE WHEN ended_at IS NOT NULL THEN 0 END, created_at, ended_at FROM mcp_events.sessions
"""
STREAMS = """
    INSERT INTO mcp_events.streams (session_id, request_id, request_key, method, final_seq, created_at, ended_at)
    SELECT CASE WHEN n <= %(own)s THEN 'large' ELSE md5((n %% %(sessions)s + 1)::text) END, n::text, 'i' || n,
           'tools/call', 100, day, day
      FROM generate_series(1, %(streams)s) n, LATERAL (
          SELECT date_trunc('day', now()) - (n %% 10 + 1) * interval '1 day' + interval '12 hours' AS day) days
"""
EVENTS = """
    INSERT INTO mcp_events.events (stream, seq, created_at, payload)
    SELECT t.number, seq, t.created_at, '{"jsonrpc":"2.0","method":"notifications/progress","params":'
           '{"progressToken":1,"progress":1,"message":"' || repeat('x', 100) || '"}}'
      FROM mcp_events.streams t, generate_series(1, 100) seq WHERE t.final_seq = 100
"""
CALLS = """
    INSERT INTO mcp_events.streams (session_id, request_id, request_key, method, worker)
    SELECT id, '1', 'c1', 'tools/call', 1 FROM mcp_events.sessions WHERE ended_at IS NULL ORDER BY id LIMIT 1000
"""


def run(bench: Bench, report: Report) -> None:
    events = 200_000 if bench.short else 10_000_000
    with bench.database() as dsn, bench.database() as other:
        began = time.perf_counter()
        fill(dsn, events)
        print(f"(filled in {time.perf_counter() - began:.0f} s)", flush=True)
        with open_desk(dsn, "mcp_events", "benchmark") as desk:
            _hundredth_page(desk)  # which has to find its place first
        for name, words, work in _commands():
            with open_desk(dsn, "mcp_events", "benchmark") as desk:
                taken = sorted(_milliseconds(partial(work, desk)) for _ in range(TIMES))
            report.add(name, OURS, p50_ms=percentile(taken, 0.5), max_ms=taken[-1], process_s=_process(dsn, *words))
        _move(report, dsn, other)


def fill(dsn: str, events: int) -> None:
    """Sessions, streams and events as the module's docstring has it."""
    streams = events // 100
    sizes = {"sessions": streams * 6 // 5, "streams": streams, "own": min(1000, streams // 10)}
    with psycopg.connect(dsn, autocommit=True) as connection:
        # Nobody waits for these commits.
        connection.execute("SET synchronous_commit = off")
        connection.execute("SET timezone = 'UTC'")
        for (statement,) in connection.execute(PARTITIONS, ()).fetchall():
            connection.execute(statement)
        connection.execute("INSERT INTO mcp_events.workers (host, pid, revision) VALUES ('h', 1, 'x')")
        connection.execute("INSERT INTO mcp_events.sessions (id, server) VALUES ('large', 'server')")
        for statement in (SESSIONS, STANDALONE, STREAMS, EVENTS, CALLS):
            connection.execute(statement, sizes)
        connection.execute("VACUUM ANALYZE")
        connection.execute("CHECKPOINT")


def _commands() -> list[tuple[str, list[str], Callable[[Desk], object]]]:
    hours = timedelta(hours=20)
    lists: list[tuple[str, list[str], Filter]] = [
        ("the live ones", [], Filter()),
        ("all of them", ["--state", "all"], Filter(state="all")),
        ("the ended ones", ["--state", "ended"], Filter(state="ended")),
        ("--server", ["--server", "server 1"], Filter(server="server 1")),
        ("--server of none", ["--server", "nobody", "--state", "all"], Filter(state="all", server="nobody")),
        ("--owner", ["--owner", "owner 5", "--state", "all"], Filter(state="all", owner='"owner 5"')),
        ("--since", ["--since", "20h", "--state", "all"], Filter(state="all", since=hours)),
        ("--idle", ["--idle", "20h"], Filter(idle=hours)),
        ("--running", ["--running"], Filter(running=True)),
        ("--method", ["--method", "tools/call"], Filter(method="tools/call")),
    ]
    found: list[tuple[str, list[str], Callable[[Desk], object]]] = []
    for name, words, wanted in lists:
        found.append(
            (
                f"sessions list, {name}",
                ["sessions", "list", *words],
                lambda desk, wanted=wanted: sessions.page(desk, wanted),
            )
        )
    found.append(("sessions list, the 100th page", ["sessions", "list"], _hundredth_page))
    found.append(("sessions show", ["sessions", "show", LARGE], lambda desk: sessions.details(desk, LARGE)))
    found.append(("stats", ["stats"], stats.collect))
    found.append(("tail, its first 20 lines", ["tail", LARGE, "--since", "1s", "--no-follow"], _first_lines))
    return found


_places: dict[str, str | None] = {}


def _hundredth_page(desk: Desk) -> object:
    if "place" not in _places:
        place = None
        for _ in range(99):
            place = sessions.page(desk, Filter(), after=place).next or place
        _places["place"] = place
    return sessions.page(desk, Filter(), after=_places["place"])


def _first_lines(desk: Desk) -> object:
    return list(itertools.islice(_following(desk), 20))


def _following(desk: Desk) -> Any:
    return tail.follow(desk, LARGE, forever=False, cut=4000, wait=lambda seconds: None)


def _move(report: Report, dsn: str, other: str) -> None:
    """What reads or writes all of the large session; once."""
    with open_desk(dsn, "mcp_events", "benchmark") as desk:
        report.add(
            "tail, 100,000 events to the end", OURS, p50_ms=_milliseconds(lambda: sum(1 for _ in _following(desk)))
        )
        lines: list[str] = []
        taken = _milliseconds(lambda: lines.extend(transfer.export(desk, LARGE, transfer.Exported())))
        report.add("export", OURS, p50_ms=taken)
        with open_desk(other, "mcp_events", "benchmark") as there:
            report.add("import", OURS, p50_ms=_milliseconds(lambda: transfer.import_session(there, lines)))
        report.add("sessions end", OURS, p50_ms=_milliseconds(lambda: sessions.end(desk, LARGE)))
        report.add("sessions purge", OURS, p50_ms=_milliseconds(lambda: sessions.purge(desk, LARGE, end_first=True)))


def _milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e3


def _process(dsn: str, *words: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "mcp_pg_events", *words, "--dsn", dsn], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    return time.perf_counter() - began
