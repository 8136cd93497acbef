"""`mcp-pg-events tail`: the messages of a session as they come, from whichever worker, without taking anything away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.e2e.conftest import StartWorkers
from tests.support.command import ROOT, mcp_pg_events, without_settings
from tests.support.log import query
from tests.support.mcp_http import Session
from tests.support.postgres import die_with_parent

pytestmark = pytest.mark.anyio

NOTE = '{"jsonrpc":"2.0","method":"notifications/message","params":{"data":%s}}'


class Tail:
    """A running `tail`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        assert process.stdout is not None and process.stderr is not None
        self.out = process.stdout
        self.err = process.stderr

    async def line(self) -> str:
        async with asyncio.timeout(20):
            return (await self.out.readline()).decode().rstrip("\n")

    async def end(self) -> tuple[int, str, str]:
        """Exit code, and what is left of stdout and stderr."""
        async with asyncio.timeout(20):
            out, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()


def interruptible() -> None:
    """A test run in the background of a shell ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if (die := die_with_parent(signal.SIGKILL)) is not None:
        die()


@contextlib.asynccontextmanager
async def tailing(dsn: str, session: str, *arguments: str) -> AsyncIterator[Tail]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mcp_pg_events", "tail", session, *arguments),
        cwd=ROOT,
        env=without_settings(MCP_PG_EVENTS_DSN=dsn, PYTHONUNBUFFERED="1"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=interruptible,
    )
    try:
        yield Tail(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def stored(dsn: str, events: dict[int, list[int]], *, session: str = "s", open_streams: tuple[int, ...] = ()) -> None:
    """A session with streams of these numbers; each event at so many seconds after the first stream was opened."""
    query(dsn, "INSERT INTO sessions (id, server) VALUES (%s, 'x') ON CONFLICT DO NOTHING", session)
    for number, seconds in events.items():
        final = None if number in open_streams else len(seconds)
        query(
            dsn,
            "INSERT INTO streams "
            "(number, session_id, request_id, request_key, method, created_at, final_seq, ended_at) "
            "OVERRIDING SYSTEM VALUE SELECT %s, %s, %s, %s, 'tools/call', date_trunc('day', now()) + "
            "%s * interval '1 ms', %s, CASE WHEN %s THEN now() END",
            *(number, session, str(number), f"i{number}", min(seconds, default=0), final, final is not None),
        )
        for seq, second in enumerate(seconds, 1):
            query(
                dsn,
                "INSERT INTO events (stream, seq, created_at, payload) "
                "VALUES (%s, %s, date_trunc('day', now()) + %s * interval '1 ms', %s)",
                *(number, seq, second, NOTE % second),
            )


def lines(dsn: str, *arguments: str) -> list[Any]:
    ran = mcp_pg_events("tail", "s", "--no-follow", "--json", *arguments, MCP_PG_EVENTS_DSN=dsn)
    assert (ran.code, ran.err) == (0, "")
    return [json.loads(line) for line in ran.out.splitlines()]


async def test_it_follows_calls_of_both_workers_and_takes_no_stream_from_anybody(
    start_workers: StartWorkers, migrated: str
) -> None:
    workers = await start_workers("mcpserver_app", 2)
    session = await Session.initialize(workers[0].url)
    assert session.session_id is not None
    async with tailing(migrated, session.session_id, "--json") as tail:
        first = json.loads(await tail.line())
        assert (first["method"], first["final"]) == ("initialize", True)
        readers = []
        for worker in workers:
            response = await session.call("count", {"n": 3, "seconds": 0.5}, progress_token="p", base_url=worker.url)
            readers.append(asyncio.create_task(response.messages()))
            seen = [json.loads(await tail.line()) for _ in range(4)]
            assert [each["seq"] for each in seen] == [1, 2, 3, 4]
            assert [each["message"].get("method") for each in seen] == ["notifications/progress"] * 3 + [None]
            assert [each["final"] for each in seen] == [False, False, False, True]
            assert seen[0]["id"] == f"{seen[0]['stream']}-1"
        assert [len(messages) for messages in await asyncio.gather(*readers)] == [4, 4]
        generations = query(migrated, "SELECT max(reader_generation) FROM streams WHERE method = 'tools/call'")
        assert generations == [(1,)]
        waiting = await session.call("wait", {"key": "never"}, base_url=workers[1].url)
        await workers.wait_for("never")
        ran = mcp_pg_events("sessions", "end", session.session_id, MCP_PG_EVENTS_DSN=migrated)
        assert ran.out == "Ended, and 1 running call with it.\n"
        final = json.loads(await tail.line())
        assert final["message"]["error"]["data"] == {"reason": "session_ended"}
        assert json.loads(await tail.line()) == {"type": "ended", "reason": "deleted"}
        assert await tail.end() == (0, "", "")
        assert (await waiting.result())["error"]["data"] == {"reason": "session_ended"}
        for worker in workers:
            assert (await session.get(base_url=worker.url)).status == 404
    workers.assert_clean_logs()


async def test_history_comes_in_the_order_of_time_and_in_pages(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_pg_events.operator.tail.PAGE_EVENTS", 3)
    monkeypatch.setattr("mcp_pg_events.operator.tail.STREAMS_AT_ONCE", 2)
    events = {n: [n * 10 + 7 * seq for seq in range(n % 4 * 3 + 1)] for n in range(1, 30)}
    stored(migrated, events, open_streams=(3, 7))
    found = lines(migrated)
    assert [(each["message"]["params"]["data"], each["stream"], each["seq"]) for each in found] == sorted(
        (second, number, seq) for number, seconds in events.items() for seq, second in enumerate(seconds, 1)
    )


async def test_a_page_is_cut_by_bytes_too(migrated: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcp_pg_events.operator.tail.PAGE_BYTES", 10)
    stored(migrated, {1: [1, 2, 3, 4, 5]})
    assert [each["seq"] for each in lines(migrated)] == [1, 2, 3, 4, 5]


async def test_it_begins_where_it_is_told_and_says_what_is_missing(migrated: str) -> None:
    stored(migrated, {1: [0, 1000, 2000], 2: [500, 3000], 3: [10]})
    query(migrated, "UPDATE streams SET ended_at = date_trunc('day', now()) + interval '10 ms' WHERE number = 3")
    [(moment,)] = query(migrated, "SELECT (date_trunc('day', now()) + interval '1000 ms')::text")
    assert [each["id"] for each in lines(migrated, "--since", moment)] == ["1-2", "1-3", "2-2"]
    query(migrated, "DELETE FROM events WHERE (stream, seq) IN ((1, 1), (1, 2), (2, 2), (3, 1))")
    found = [each.get("id") or (each["stream"], each["first_seq"], each["last_seq"]) for each in lines(migrated)]
    assert found[:3] == ["2-1", (1, 1, 2), "1-3"]
    assert sorted(found[3:]) == [(2, 2, 2), (3, 1, 1)]
    shown = mcp_pg_events("tail", "s", "--no-follow", MCP_PG_EVENTS_DSN=migrated).out
    assert "1-1 to 2: no longer kept" in shown


async def test_lines_are_short_and_have_no_escape_sequence(migrated: str) -> None:
    stored(migrated, {1: [1, 2]})
    hostile = "\x1b]0;title\x07\x1b[2J\u202e\x9b31m[red]"
    query(migrated, "UPDATE events SET payload = %s WHERE seq = 1", NOTE % json.dumps(hostile, ensure_ascii=False))
    query(migrated, "UPDATE events SET payload = %s WHERE seq = 2", NOTE % json.dumps("x" * 10**6))
    query(migrated, "UPDATE streams SET method = %s, request_id = %s", hostile, hostile)
    for arguments in ([], ["--full"], ["--json"]):
        ran = mcp_pg_events("tail", "s", "--no-follow", *arguments, MCP_PG_EVENTS_DSN=migrated)
        assert (ran.code, ran.err) == (0, "")
        assert all(character.isprintable() or character == "\n" for character in ran.out)
        assert "[red]" in ran.out
        longest = max(map(len, ran.out.splitlines()))
        assert longest > 10**6 if arguments else longest <= 200


async def test_a_session_that_there_is_not_is_said_and_one_that_is_removed_ends_it(migrated: str) -> None:
    ran = mcp_pg_events("tail", "nobody", MCP_PG_EVENTS_DSN=migrated)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("mcp-pg-events: There is no session 'nobody' in schema mcp_events;")
    stored(migrated, {1: [1]}, open_streams=(1,))
    async with tailing(migrated, "s") as tail:
        assert "tools/call 1" in await tail.line()
        query(migrated, "DELETE FROM sessions")
        assert await tail.end() == (0, "", "The session is gone.\n")


async def test_ctrl_c_and_a_closed_pipe_are_no_failures(migrated: str) -> None:
    stored(migrated, {1: [1]}, open_streams=(1,))
    async with tailing(migrated, "s") as tail:
        await tail.line()
        tail.process.send_signal(signal.SIGINT)
        assert await tail.end() == (130, "", "")
    async with tailing(migrated, "s") as tail:
        await tail.line()
        # Nothing more is written: it has to notice by itself.
        tail.out._transport.close()  # type: ignore[attr-defined]  # the reader's end of the pipe
        async with asyncio.timeout(10):
            assert await tail.process.wait() == 0
        assert await tail.err.read() == b""
