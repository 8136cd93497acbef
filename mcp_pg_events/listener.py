"""The one connection that listens, and whose advisory lock is this worker's life.

It is never from the pool and never runs queries while it listens. A NOTIFY to its own channel has to come back within
two seconds, at the start and then periodically: through PgBouncer in transaction mode LISTEN is silently dead. After a
reconnection every local reader reads the log once, so what was missed only came later.
Next: the hub (streams to read, readers that are superseded) and the inbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import psycopg

from . import tasks
from .appends import Identity
from .database import Connection, Database, Limit, translate
from .errors import Error, ListenUnavailable
from .queries import Queries
from .schema import REVISION

__all__ = ["Listener"]

logger = logging.getLogger(__name__)

PING_TIMEOUT: Final = 2.0
PING_INTERVAL: Final = 10.0
PATIENCE: Final = 10.0

# The lock of a worker whose network is gone is held by its backend, until the server's own TCP settings notice.
_SERVER_KEEPALIVES: Final = (
    "SELECT set_config(name, value, false) FROM (VALUES ('tcp_keepalives_idle', '5'), ('tcp_keepalives_count', '2'), "
    "('tcp_keepalives_interval', '2'), ('tcp_user_timeout', '8000')) settings(name, value)"
)


class Listener:
    """Receives this worker's notifications and hands them to `on_notification`; `on_resync` follows each
    reconnection."""

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        database: Database,
        queries: Queries,
        identity: Identity,
        channel_prefix: str,
        schema_oid: int,
        *,
        on_notification: Callable[[str], None],
        on_resync: Callable[[], None],
    ) -> None:
        self._connect = connect
        self._database = database
        self._queries = queries
        self._prefix = channel_prefix
        self._schema_oid = schema_oid
        self._on_notification = on_notification
        self._on_resync = on_resync
        self._identity = identity
        self._connection: Connection | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._receiving: asyncio.Task[None] | None = None
        self._stopping = False
        self._pong = asyncio.Event()
        self._registered = False
        self._listening = asyncio.Event()
        self.up_since: float | None = None
        """When (loop time) it began to listen; None while it does not."""

    async def start(self) -> None:
        """Register this worker, and begin to listen.

        Raises:
            ListenUnavailable: what is sent to the channel does not come back.
            DatabaseUnavailable: there is no connection to be had.
        """
        try:
            await self._open()
        except (psycopg.Error, OSError) as error:
            raise translate(error) from error
        self._tasks = [asyncio.create_task(self._run(), name="mcp_pg_events.listener")]
        if not await self._ping():
            await self.stop()
            raise ListenUnavailable(
                "A notification sent to this worker's own channel did not come back within 2 s, so LISTEN does not "
                "work over this connection (PgBouncer in transaction mode?); give a direct connection as `listen_dsn`"
            )
        self._tasks.append(asyncio.create_task(self._keep_pinging(), name="mcp_pg_events.listener.ping"))

    async def stop(self) -> None:
        """Stop listening and let the lock go."""
        self._stopping = True
        await tasks.end(*self._tasks)
        self._tasks = []
        await self._close()

    async def renew(self) -> None:
        """Register anew: a new number, and so a new channel and a new lock, on a new connection. Returns when they are
        there, however long the database is away."""
        self._registered = False
        self._listening.clear()
        self._drop()
        await self._listening.wait()

    async def _open(self) -> None:
        connection = await self._connect()
        try:
            with Limit(connection, PATIENCE):
                await connection.execute(_SERVER_KEEPALIVES)
                if self._registered:
                    # Waits for nobody but an old backend of this worker's own, whose connection is gone.
                    await connection.execute(
                        self._queries.lock_worker, {"oid": self._schema_oid, "me": self._identity.number}
                    )
                else:
                    await self._register(connection)
                channel = psycopg.sql.Identifier(f"{self._prefix}{self._identity.number}")
                await connection.execute(psycopg.sql.SQL("LISTEN {}").format(channel))
        except BaseException:
            await connection.close()
            raise
        self._connection = connection
        self.up_since = asyncio.get_running_loop().time()
        if self._registered:
            self._listening.set()

    async def _register(self, connection: Connection) -> None:
        self._registered = True
        # Not cancelled in the middle: the row may be there, and this worker has to know its number to end it.
        inserting = asyncio.create_task(self._insert(connection))
        try:
            await asyncio.shield(inserting)
        except asyncio.CancelledError:
            await asyncio.gather(inserting, return_exceptions=True)
            raise
        except BaseException:
            self._registered = False
            raise

    async def _insert(self, connection: Connection) -> None:
        cursor = await connection.execute(
            self._queries.register_worker,
            {"oid": self._schema_oid, "host": socket.gethostname()[:255], "pid": os.getpid(), "revision": REVISION},
        )
        row = await cursor.fetchone()
        assert row is not None
        self._identity.number, self._identity.epoch = row[0], 0

    async def _run(self) -> None:
        pause = 0.0
        explained = False
        while True:
            try:
                if self._connection is None:
                    await self._open()
                    logger.warning("Listening again")
                    self._on_resync()
                pause = 0.0
                # A task of its own: closing a connection under its `notifies()` would leave that waiting for ever.
                self._receiving = asyncio.create_task(self._receive())
                if not self._registered:
                    # A new number is wanted since this connection was opened.
                    self._drop()
                await self._receiving
            except asyncio.CancelledError:
                # Its receiver's, as a rule; or this task's own.
                this = asyncio.current_task()
                if self._stopping or (this is not None and this.cancelling()):
                    raise
            except (psycopg.Error, Error, OSError) as error:
                if self.up_since is not None:
                    logger.warning("The listening connection was lost, connecting again: %s", translate(error))
                    explained = False
                elif not explained:
                    logger.warning("There is no connection to listen on, trying on: %s", translate(error))
                    explained = True
            finally:
                await self._close()
            await asyncio.sleep(pause)
            pause = min(1.0, pause * 2 or 0.05)

    async def _receive(self) -> None:
        assert self._connection is not None
        async for notification in self._connection.notifies():
            if notification.payload == "p":
                self._pong.set()
                continue
            try:
                self._on_notification(notification.payload)
            except Exception:
                logger.exception("A notification could not be handled")

    def _drop(self) -> None:
        """Make `_run` connect anew."""
        if self._receiving is not None:
            self._receiving.cancel()

    async def _close(self) -> None:
        await tasks.end(self._receiving)
        self._receiving = None
        self.up_since = None
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _ping(self) -> bool:
        self._pong.clear()
        await self._database.fetch(
            self._queries.ping, {"channel": f"{self._prefix}{self._identity.number}", "payload": "p"}
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PING_TIMEOUT):
                await self._pong.wait()
        return self._pong.is_set()

    async def _keep_pinging(self) -> None:
        while True:
            await asyncio.sleep(PING_INTERVAL)
            if self.up_since is None:
                continue
            try:
                if not await self._ping() and self.up_since is not None:
                    logger.warning("The listening connection is deaf, connecting again")
                    self._drop()
            except Error:
                # The database is away as a whole; the writer and the requests say so.
                continue
