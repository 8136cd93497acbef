"""The embedded PostgreSQL: shared by processes, stopped by the last one, right again after any kill."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from mcp_pg_events import embedded, embedded_binaries
from mcp_pg_events.embedded import embedded_postgres
from mcp_pg_events.errors import ConfigurationError
from tests.support.command import mcp_pg_events
from tests.support.tools import allow_skip

pytestmark = pytest.mark.skipif(not embedded.available(), reason="needs: pip install 'mcp-pg-events[embedded]'")

# A user of the server: says when it is in, stays until its input ends.
USER = """
import sys
from mcp_pg_events.embedded import embedded_postgres
with embedded_postgres(sys.argv[1], schema=None) as dsn:
    print(dsn, flush=True)
    sys.stdin.read()
"""
StartUser = Callable[[Path], subprocess.Popen[str]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Path]:
    """A home that was used once, to copy: a copy takes a tenth of the time of a new cluster."""
    with temporary_home() as directory:
        with embedded_postgres(directory, schema=None):
            pass
        yield directory


@pytest.fixture
def home(cluster: Path) -> Iterator[Path]:
    """A home with a cluster in it that does not run."""
    with temporary_home() as directory:
        subprocess.run(["cp", "-a", f"{cluster}/.", directory], check=True)
        yield directory


@pytest.fixture
def new_home() -> Iterator[Path]:
    """An empty directory."""
    with temporary_home() as directory:
        yield directory


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    # Not tmp_path: its parents are closed to the account that PostgreSQL runs under when the tests run as root.
    directory = Path(tempfile.mkdtemp(prefix="mcp-pg-events-test-"))
    try:
        yield directory
    finally:
        if (pid := postmaster(directory)) is not None and embedded._is_postgres(pid):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def start_user() -> Iterator[StartUser]:
    started: list[subprocess.Popen[str]] = []

    def start(home: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", USER, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def postmaster(home: Path) -> int | None:
    try:
        return int((home / "data" / "postmaster.pid").read_text().splitlines()[0])
    except FileNotFoundError:
        return None


def entered(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def leave(user: subprocess.Popen[str]) -> None:
    user.communicate(timeout=30)
    assert user.returncode == 0


def running(home: Path) -> bool:
    pid = postmaster(home)
    return pid is not None and embedded._is_postgres(pid)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while embedded._is_postgres(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not embedded._is_postgres(pid)


def test_two_processes_that_start_at_once_share_one_server_and_the_last_stops_it(
    new_home: Path, start_user: StartUser
) -> None:
    first, second = start_user(new_home), start_user(new_home)
    assert entered(first) == entered(second)
    pid = postmaster(new_home)
    assert pid is not None
    leave(first)
    assert running(new_home)
    leave(second)
    assert postmaster(new_home) is None
    assert gone(pid)


def test_data_stay_across_restarts_and_fsync_is_on(home: Path) -> None:
    with embedded_postgres(home, schema=None) as dsn, psycopg.connect(dsn) as connection:
        assert connection.execute("SHOW fsync").fetchone() == ("on",)
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    assert not running(home)
    with embedded_postgres(home, schema=None) as again, psycopg.connect(again) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
        assert again == dsn  # the port too, so that whoever has the DSN finds the server again


def test_a_killed_user_does_not_keep_the_server_running(home: Path, start_user: StartUser) -> None:
    killed, other = start_user(home), start_user(home)
    entered(killed), entered(other)
    killed.kill()
    killed.wait()
    assert running(home)
    leave(other)
    assert not running(home)


def test_a_server_whose_only_user_was_killed_is_stopped_and_can_start_again(home: Path, start_user: StartUser) -> None:
    killed = start_user(home)
    dsn = entered(killed)
    pid = postmaster(home)
    assert pid is not None
    killed.kill()
    killed.wait()
    assert gone(pid)
    with embedded_postgres(home, schema=None) as again:
        assert again == dsn
    assert not running(home)


def test_users_that_come_and_go_while_others_are_killed_always_find_it(home: Path, start_user: StartUser) -> None:
    for _ in range(4):
        start_user(home)
        killed = start_user(home)
        entered(killed)
        killed.kill()  # and the next one comes while its keeper wakes up
        with embedded_postgres(home, schema=None) as dsn:
            psycopg.connect(dsn).close()


def test_a_killed_server_is_started_again_over_its_stale_pid_file(home: Path, start_user: StartUser) -> None:
    user = start_user(home)
    with psycopg.connect(entered(user), autocommit=True) as connection:
        connection.execute("CREATE TABLE committed AS SELECT 1 AS one")
        pid = postmaster(home)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)  # its children notice only now, so the new server meets their shared memory
    with embedded_postgres(home, schema=None) as dsn, psycopg.connect(dsn) as connection:
        assert postmaster(home) != pid
        assert connection.execute("SELECT one FROM committed").fetchone() == (1,)
    assert running(home)  # the first user is still there
    leave(user)
    assert not running(home)


def test_a_stale_pid_file_that_names_some_other_live_process_is_no_obstacle(home: Path) -> None:
    with embedded_postgres(home, schema=None):
        lines = (home / "data" / "postmaster.pid").read_text().splitlines()
    lines[0] = str(os.getpid())
    (home / "data" / "postmaster.pid").write_text("\n".join(lines) + "\n")
    with embedded_postgres(home, schema=None) as dsn:
        psycopg.connect(dsn).close()


def test_an_initdb_that_was_killed_half_way_leaves_nothing_that_matters(new_home: Path) -> None:
    (new_home / "users").touch()
    half = new_home / "new-killed"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    with embedded_postgres(new_home, schema=None) as dsn:
        psycopg.connect(dsn).close()
    assert not half.exists()


def test_it_listens_on_loopback_and_wants_the_password(home: Path) -> None:
    with embedded_postgres(home, schema=None) as dsn:
        info = psycopg.conninfo.conninfo_to_dict(dsn)
        assert info["host"] == "127.0.0.1"
        assert (home / "password").stat().st_mode & 0o077 == 0
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(dsn, password="guess")


def test_data_of_another_major_version_are_refused_in_one_sentence(home: Path) -> None:
    (home / "data" / "PG_VERSION").write_text("13\n")
    with pytest.raises(ConfigurationError, match=r"belong to PostgreSQL 13 and the installed binaries are \d+: move"):
        with embedded_postgres(home, schema=None):
            pass


def test_a_directory_that_holds_something_else_is_refused(new_home: Path) -> None:
    (new_home / "thesis.tex").touch()
    with pytest.raises(ConfigurationError, match=r"holds something other than an embedded PostgreSQL: name an empty"):
        with embedded_postgres(new_home, schema=None):
            pass
    assert new_home.stat().st_uid == os.geteuid()


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cannot use .*file/home \(Not a directory\): name another directory"):
        with embedded_postgres(tmp_path / "file" / "home", schema=None):
            pass


def test_a_link_where_a_file_should_be_is_not_followed(home: Path, tmp_path: Path) -> None:
    """As root, the home belongs to an account that must not be able to have root write anywhere else."""
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    (home / "port").unlink()
    (home / "port").symlink_to(secret)
    with pytest.raises(OSError, match="symbolic links"):
        with embedded_postgres(home, schema=None):
            pass
    assert secret.read_text() == "untouched"
    assert not running(home)


@pytest.mark.parametrize("command", [("demo",), ("serve", "weather:mcp", "--port", "0")])
def test_without_the_extra_one_sentence_says_what_to_do(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weather.py").write_text("from mcp.server.mcpserver import MCPServer\n\nmcp = MCPServer('weather')\n")
    monkeypatch.setattr(embedded_binaries, "packaged", lambda: None)
    ran = mcp_pg_events(*command, directory=tmp_path)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (
        "mcp-pg-events: There is no DSN and no embedded PostgreSQL: give --dsn (or MCP_PG_EVENTS_DSN), "
        "or `pip install 'mcp-pg-events[embedded]'`.\n"
    )


def test_binaries_that_the_account_cannot_reach_are_copied(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        allow_skip("only root needs another account for PostgreSQL")
    packaged = embedded_binaries.packaged()
    assert packaged is not None
    closed = home.with_name(f"{home.name}-closed")
    closed.mkdir(mode=0o700)
    try:
        (closed / "embedded_postgres.libs").symlink_to(packaged.parents[2] / "embedded_postgres.libs")
        (closed / "embedded_postgres").symlink_to(packaged.parents[1])
        monkeypatch.setattr(embedded_binaries, "packaged", lambda: closed / "embedded_postgres" / "pginstall" / "bin")
        with embedded_postgres(home, schema=None) as dsn:
            psycopg.connect(dsn).close()
        assert list(home.glob("binaries-*/embedded_postgres/pginstall/bin/postgres"))
        assert not list(home.glob("binaries-new-*"))
    finally:
        shutil.rmtree(closed)
