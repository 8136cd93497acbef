"""PgBouncer between workers and a PostgreSQL of a test's own.

async with PgBouncer.before(server) as bouncer:
    bouncer.dsn         # the workers' role, in transaction mode
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg

from tests.support.postgres import PASSWORD, die_with_parent, dsn_url, free_port
from tests.support.servers import DATABASE, ROLE, Server
from tests.support.tools import require_tool

CONFIGURATION = """
[databases]
{database} = host={host} port={port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {home}/users
pool_mode = {mode}
default_pool_size = {pool_size}
server_login_retry = 1
"""


class PgBouncer:
    """One PgBouncer; its clients share `pool_size` connections to the server."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.port = free_port()

    @property
    def dsn(self) -> str:
        return dsn_url("", host="127.0.0.1", port=self.port, user=ROLE, password=PASSWORD, dbname=DATABASE)

    def log(self) -> str:
        return (self._home / "log").read_text(errors="replace")

    @classmethod
    @contextlib.asynccontextmanager
    async def before(cls, server: Server, *, mode: str = "transaction", pool_size: int = 3) -> AsyncIterator[PgBouncer]:
        """Run one in front of `server` until the block ends; skips the test where there is none installed."""
        program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/sbin")
        program = program or require_tool("pgbouncer", "run `apt-get install pgbouncer`.")
        with tempfile.TemporaryDirectory(prefix="pgbouncer-", ignore_cleanup_errors=True) as made:
            home = Path(made)
            bouncer = cls(home)
            configuration = CONFIGURATION.format(
                database=DATABASE,
                host=server.host,
                port=server.port,
                listen_port=bouncer.port,
                home=home,
                mode=mode,
                pool_size=pool_size,
            )
            (home / "ini").write_text(configuration)
            (home / "users").write_text(f'"{ROLE}" "{PASSWORD}"\n')
            for path in (home, home / "ini", home / "users"):
                if server.user is not None:
                    shutil.chown(path, server.user)
            with (home / "log").open("wb") as output:
                process = await asyncio.create_subprocess_exec(
                    *(program, str(home / "ini")),
                    user=server.user,
                    cwd="/",
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    preexec_fn=die_with_parent(signal.SIGTERM),
                )
            try:
                async with asyncio.timeout(10):
                    while True:
                        try:
                            async with await psycopg.AsyncConnection.connect(bouncer.dsn, connect_timeout=5):
                                break
                        except psycopg.OperationalError:
                            assert process.returncode is None, bouncer.log()
                            await asyncio.sleep(0.02)
                yield bouncer
            finally:
                if process.returncode is None:
                    process.terminate()
                await process.wait()
