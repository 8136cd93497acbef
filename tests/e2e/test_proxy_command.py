"""`mcp-pg-events proxy --upstream URL`: real processes, what `--check` finds, and what is said when it cannot serve."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.e2e.conftest import Proxy
from tests.support.command import mcp_pg_events, without_settings
from tests.support.mcp_http import Session, request
from tests.support.served import UNREACHABLE, url_of
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def upstream(anyio_backend: str) -> AsyncIterator[Workers]:
    async with run_workers("mcpserver_app", None, 1) as workers:
        yield workers


@pytest.fixture(scope="module")
def durable_upstream_dsn(migrated_once: str) -> Iterator[str]:
    yield migrated_once


async def checked(url: str, *more: str) -> tuple[int, dict[str, str]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "mcp_pg_events", "proxy", "--upstream", url, "--check", "--json", *more),
        env=without_settings(),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    found = json.loads(out)
    assert found["ok"] == (process.returncode == 0)
    return process.returncode or 0, {check["name"]: check["status"] for check in found["checks"]}


async def test_two_workers_serve_an_upstream_and_say_what_it_lacks(
    upstream: Workers, migrated: str, proxy: Proxy
) -> None:
    proxied = proxy("--dsn", migrated, "--workers", "2", "--upstream", f"{upstream[0].url}/mcp")
    url = await url_of(proxied)
    session = await Session.initialize(url, path="/mcp?key=secret")
    for _ in range(8):
        assert await session.call_result("echo", {"text": "on"}) == "on"
    assert (await (await request("GET", f"{url}/readyz")).json()) == {"status": "ready"}
    assert "They have no ids" in proxied.log.read_text()
    assert "secret" not in proxied.log.read_text()
    proxied.process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(proxied.process.wait, 20) == 0


async def test_a_check_tells_what_can_be_expected(upstream: Workers, durable_upstream_dsn: str) -> None:
    assert await checked(f"{upstream[0].url}/mcp") == (
        0,
        {"upstream": "ok", "session": "ok", "events": "warn", "standalone": "ok"},
    )
    async with run_workers("mcpserver_app", durable_upstream_dsn, 1) as resumable:
        assert await checked(f"{resumable[0].url}/mcp") == (
            0,
            {"upstream": "ok", "session": "ok", "events": "ok", "standalone": "ok"},
        )
    for wrong in ("/mcp/", "/elsewhere"):
        assert await checked(upstream[0].url + wrong) == (1, {"upstream": "fail"})
    assert await checked("http://127.0.0.1:1/mcp") == (1, {"upstream": "fail"})


def test_a_name_that_cannot_be_resolved_is_said() -> None:
    ran = mcp_pg_events("proxy", "--upstream", "http://no.such.host.invalid/mcp?key=secret", "--check")
    assert (ran.code, ran.err) == (1, "")
    assert " ".join(ran.out.split()).startswith("fail upstream The upstream's name cannot be resolved -> ")


def test_its_help_is_whole_on_a_narrow_terminal() -> None:
    ran = mcp_pg_events("proxy", "--help", COLUMNS="80", TERMINAL_WIDTH="80")
    assert (ran.code, "…" in ran.out) == (0, False)


def test_what_is_wrong_is_said_in_one_sentence() -> None:
    for arguments, sentence in (
        (("--upstream", "ftp://x/mcp"), "The upstream's URL is that of its MCP endpoint"),
        (("--upstream", "http://u:secret@x/mcp"), "The upstream's URL contains a user"),
        (("--upstream", "http://x/mcp", "--path", "mcp"), "The path 'mcp' has to begin with a slash"),
        (("--upstream", "http://x/mcp", "--cors-origin", "x"), "'x' is no origin such as https://app.example.com"),
        (("--upstream", "https://x/mcp", "--ca-file", "none"), "The file of certificates 'none' cannot be used"),
        (("--upstream", "http://x/mcp", "--port", "0", "--dsn", UNREACHABLE), "PostgreSQL cannot be used"),
    ):
        ran = mcp_pg_events("proxy", *arguments, MCP_PG_EVENTS_DSN=UNREACHABLE)
        assert (ran.code, ran.out) == (1, ""), arguments
        assert ran.err.startswith(f"mcp-pg-events: {sentence}"), ran.err
        assert len(ran.err.strip().splitlines()) == 1
        assert "secret" not in ran.err
    for arguments in ((), ("--upstream", "http://x/mcp", "--", "ls"), ("--check", "--", "ls"), ("--json",)):
        assert mcp_pg_events("proxy", *arguments).code == 2, arguments
    assert mcp_pg_events("proxy", "--upstream", "http://x/mcp", "--max-processes", "3").code == 2
    assert mcp_pg_events("proxy", "--insecure", "--", "ls").code == 2


@pytest.mark.parametrize("more", [["--check"], ["--check", "--json"], ["--port", "0", "--dsn", UNREACHABLE]])
def test_without_the_extra_it_says_how_to_get_it(more: list[str]) -> None:
    program = "import sys; sys.modules['aiohttp'] = None\nfrom mcp_pg_events.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", program, "proxy", "--upstream", "http://127.0.0.1:1/mcp", *more],
        env=without_settings(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        "mcp-pg-events: An upstream over HTTP needs the `proxy` extra: pip install 'mcp-pg-events[proxy]'.\n"
    )
