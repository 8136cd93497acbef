"""`mcp-pg-events proxy -- COMMAND`: real processes, and what it says when it cannot."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Proxy
from tests.support.command import mcp_pg_events
from tests.support.mcp_http import Session
from tests.support.processes import gone
from tests.support.programs import pid_of
from tests.support.served import UNREACHABLE, url_of
from tests.support.until import until

pytestmark = pytest.mark.anyio

PROGRAM = [sys.executable, str(Path(__file__).parents[1] / "servers" / "stdio_program.py")]


async def test_two_replicas_on_one_database_stand_in_for_each_other(
    migrated: str, proxy: Proxy, tmp_path: Path
) -> None:
    options = ("--dsn", migrated, "--env", "GIVEN=1", "--env", "PGAPPNAME", "--log-level", "warning")
    replicas = [proxy(*options, "--", *PROGRAM, PGAPPNAME="asked for", PGCONNECT_TIMEOUT="9") for _ in range(2)]
    urls = [await url_of(replica) for replica in replicas]
    session = await Session.initialize(urls[0])
    environment = json.loads(await session.call_result("whoami", base_url=urls[1]))["environment"]
    assert {name for name in environment if name.startswith(("PG", "MCP_PG"))} == {"PGAPPNAME"}
    assert environment["GIVEN"] == "1"
    assert await session.call_result("echo", {"text": "there"}, base_url=urls[1]) == "there"
    pid = await pid_of(session)
    replicas[0].process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(replicas[0].process.wait, 20) == 0
    assert await gone(pid)
    assert (await session.call("echo", {"text": "x"}, base_url=urls[1])).status == 404
    again = await Session.initialize(urls[1])
    assert await again.call_result("echo", {"text": "on"}) == "on"


async def test_two_workers_of_one_command_share_its_port(migrated: str, proxy: Proxy) -> None:
    proxied = proxy("--dsn", migrated, "--workers", "2", "--path", "/here", *PROGRAM)
    url = await url_of(proxied)
    sessions = [await Session.initialize(url, path="/here") for _ in range(4)]
    for session in sessions:
        for _ in range(4):
            assert await session.call_result("echo", {"text": "on"}) == "on"
    pids = [await pid_of(session) for session in sessions]
    proxied.process.kill()
    await until(lambda: gone(*pids), timeout=20)


@pytest.mark.slow
async def test_without_a_dsn_it_brings_its_own_database(proxy: Proxy, home: Path) -> None:
    proxied = proxy("--", *PROGRAM, MCP_PG_EVENTS_HOME=str(home))
    session = await Session.initialize(await url_of(proxied))
    assert await session.call_result("echo", {"text": "on"}) == "on"
    proxied.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(proxied.process.wait, 30) == 0


def test_what_is_wrong_is_said_in_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
        for arguments, sentence in (
            (("--", "no-such-program"), "There is no program 'no-such-program' that could be run"),
            (("--path", "mcp", *PROGRAM), "The path 'mcp' has to begin with a slash"),
            (("--path", "/livez", *PROGRAM), "The path '/livez' is the endpoint's"),
            (("--env", "NOT_THERE_AT_ALL", *PROGRAM), "There is no variable 'NOT_THERE_AT_ALL' in this environment"),
            (("--env", "=x", *PROGRAM), "'=x' is no NAME or NAME=VALUE"),
            (("--port", port, *PROGRAM), f"Cannot listen on 127.0.0.1 port {port}"),
            (("--port", "0", "--dsn", UNREACHABLE, *PROGRAM), "PostgreSQL cannot be used"),
        ):
            ran = mcp_pg_events("proxy", *arguments, MCP_PG_EVENTS_DSN=UNREACHABLE)
            assert (ran.code, ran.out) == (1, ""), arguments
            assert ran.err.startswith(f"mcp-pg-events: {sentence}"), ran.err
            assert len(ran.err.strip().splitlines()) == 1
            assert "secret" not in ran.err
    assert mcp_pg_events("proxy").code == 2


async def test_a_page_of_another_site_cannot_reach_it_on_loopback(migrated: str, proxy: Proxy) -> None:
    url = await url_of(proxy("--dsn", migrated, "--", *PROGRAM))
    session = await Session.initialize(url)
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        refused = await session.post({"jsonrpc": "2.0", "id": 1, "method": "ping"}, headers=headers)
        assert refused.status in (403, 421)
    assert os.environ.get("MCP_PG_EVENTS_PROXY") is None
