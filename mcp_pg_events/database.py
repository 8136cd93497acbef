"""The only place that opens connections, and the only one that reads driver errors.

Three kinds of connection leave here: the pool's (requests), single ones (the writer, the wake-ups) and the
listener's. All are in autocommit mode; a transaction is opened where one is meant. Next: `queries.py` has what runs on
them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, LiteralString, TypeVar

import anyio
import psycopg
from psycopg import AsyncConnection, conninfo, errors
from psycopg.rows import TupleRow
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from . import arrays, tasks
from .errors import ConfigurationError, DatabaseRefused, DatabaseUnavailable, Error, NotMigrated

__all__ = ["Connection", "Database", "Limit", "connect", "is_outage", "normalise_dsn", "translate"]

Connection = AsyncConnection[TupleRow]
T = TypeVar("T")

POOL_NAME: Final = "mcp_pg_events"
QUEUE_PATIENCE: Final = 15.0
"""How long (seconds) a request waits for a connection while the database answers others."""

# With a query or a NOTIFY in flight, keepalives alone left a dead peer's locks held past 45 s; with the user time-out
# it took 9 s (measured). Both are libpq parameters and yield to what the DSN says.
_DEFAULTS: Final[dict[str, Any]] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "tcp_user_timeout": 8000,
    "application_name": "mcp_pg_events",
}


# What the server itself reports has undone the whole transaction, which may so begin again.
_UNDONE: Final = (errors.ReadOnlySqlTransaction, errors.SerializationFailure, errors.DeadlockDetected)


def normalise_dsn(dsn: str) -> str:
    """`dsn` (a URI or key=value pairs) with this package's connection defaults for what it leaves out.

    Raises:
        ConfigurationError: it is neither.
    """
    try:
        given = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # The driver's text quotes the DSN, and with it the password.
        raise ConfigurationError(
            "The DSN cannot be read; it looks like postgresql://user:password@host:5432/database"
        ) from None
    return conninfo.make_conninfo("", **{**_DEFAULTS, **given})


def is_outage(error: BaseException) -> bool:
    """Whether the database, and not the statement, is at fault, so that the same statement may work later."""
    if isinstance(error, PoolTimeout | DatabaseUnavailable | TimeoutError | OSError):
        return True
    if isinstance(
        error,
        errors.ReadOnlySqlTransaction
        | errors.SerializationFailure
        | errors.DeadlockDetected
        | errors.LockNotAvailable
        | errors.QueryCanceled
        | errors.IdleInTransactionSessionTimeout
        | errors.InsufficientResources,
    ):
        return True
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return True
    # 57P: the server ends sessions (restart, crash, pg_terminate_backend); 08: the connection is gone.
    return isinstance(error, psycopg.Error) and (error.sqlstate or "")[:3] in ("57P", "08P", "080")


def translate(error: BaseException) -> Error:
    """The error of this package that says what `error` means to a user, without the DSN."""
    if isinstance(error, Error):
        return error
    if isinstance(error, errors.UndefinedTable | errors.InvalidSchemaName | errors.UndefinedColumn):
        return NotMigrated()
    if isinstance(error, errors.UndefinedFunction):
        return NotMigrated(
            "The database's schema lacks a function that this version needs; run `mcp-pg-events migrate`."
        )
    if isinstance(error, errors.InsufficientPrivilege):
        detail = error.diag.message_primary or "permission denied"
        return DatabaseRefused(
            f"The database role may not do this ({detail}); grant it with `mcp-pg-events migrate --worker-role ROLE`"
        )
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("No connection to PostgreSQL was to be had in time; check that it runs")
    if isinstance(error, TimeoutError):
        return DatabaseUnavailable("PostgreSQL did not answer in time; check that it runs, and what holds its locks")
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        # Its primary message alone: DETAIL and CONTEXT may quote the row, and so a payload.
        text = error.diag.message_primary or type(error).__name__
    else:
        text = str(error) if isinstance(error, psycopg.Error | OSError) else type(error).__name__
    text = " ".join(text.split())
    if not is_outage(error):
        return DatabaseRefused(
            f"PostgreSQL refused a statement ({text[:300]}); the schema may have been changed by hand"
        )
    return DatabaseUnavailable(
        f"PostgreSQL cannot be used ({text[:300]}); check that it runs and that the DSN is right"
    )


async def connect(dsn: str, *, prepare_threshold: int | None = 5, first: bytes | None = None) -> Connection:
    """One autocommit connection, on which the statement `first` has run.

    Raises:
        DatabaseUnavailable: it could not be made.
    """
    try:
        connection = await AsyncConnection.connect(
            normalise_dsn(dsn), autocommit=True, prepare_threshold=prepare_threshold
        )
        await _prepare(connection, first)
    except (psycopg.Error, OSError) as error:
        raise translate(error) from None
    return connection


async def _prepare(connection: Connection, first: bytes | None) -> None:
    arrays.register(connection.adapters)
    if first is not None:
        try:
            with Limit(connection, 5.0):
                # With parameters, if none: the statement's percent signs are doubled.
                await connection.execute(first, {})
        except BaseException:
            await connection.close()
            raise


class Limit:
    """Ends what runs on a connection inside this block after some seconds, by TimeoutError.

    It asks the server to cancel, and closes the socket a second later: a frozen server answers nothing while its kernel
    goes on acknowledging. A connection on which that happened is closed, since the cancellation may still be on its
    way. The statement may have been committed all the same.
    """

    __slots__ = ("_connection", "_seconds", "_task", "_timer", "expired")

    def __init__(self, connection: Connection, seconds: float) -> None:
        self._connection = connection
        self._seconds = seconds
        self._task: asyncio.Task[None] | None = None
        self.expired = False

    def __enter__(self) -> Limit:
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._task is not None:
            self._task.cancel()
        if self.expired:
            self._connection.pgconn.finish()
            if isinstance(error, psycopg.Error):
                raise TimeoutError from error

    def end_now(self) -> None:
        """Do not wait for the seconds to pass."""
        if not self.expired:
            self._timer.cancel()
            self._ask()

    def _ask(self) -> None:
        self.expired = True
        self._task = asyncio.create_task(self._cancel(), name="mcp_pg_events.cancel")
        self._timer = asyncio.get_running_loop().call_later(1.0, self._cut)

    async def _cancel(self) -> None:
        with contextlib.suppress(psycopg.Error, OSError):
            await self._connection.cancel_safe(timeout=1.0)

    def _cut(self) -> None:
        with (
            contextlib.suppress(psycopg.Error, OSError),
            socket.socket(fileno=os.dup(self._connection.fileno())) as twin,
        ):
            twin.shutdown(socket.SHUT_RDWR)


class Database:
    """A pool, and statements that survive the death of a pooled connection and end when the database hangs."""

    def __init__(
        self, dsn: str, *, max_connections: int, prepare_threshold: int | None, first: bytes | None = None
    ) -> None:
        async def configure(connection: Connection) -> None:
            await _prepare(connection, first)

        _quieten_pool()
        self._answered = float("-inf")
        self._running: set[asyncio.Task[Any]] = set()
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            normalise_dsn(dsn),
            min_size=1,
            max_size=max_connections,
            open=False,
            kwargs={"autocommit": True, "prepare_threshold": prepare_threshold},
            configure=configure,
            timeout=5,
            reconnect_timeout=2,
            name=POOL_NAME,
        )

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        try:
            if self._running:
                await asyncio.wait(self._running, timeout=1)
            await tasks.end(*self._running)
        finally:
            await self._pool.close(timeout=2)

    def answered_within(self, seconds: float) -> bool:
        """Whether any statement has succeeded during the last `seconds`."""
        return asyncio.get_running_loop().time() - self._answered <= seconds

    async def fetch(
        self,
        statement: bytes | LiteralString,
        parameters: dict[str, Any] | None = None,
        *,
        patience: float = 2.0,
        prepare: bool | None = None,
    ) -> list[TupleRow]:
        """Run one statement, and its rows. Outages are waited out for `patience` seconds.

        A connection that died in the pool fails its first statement, so one that may run twice is run again on another.
        Whoever calls this with a statement that may not says how it tells.

        Raises:
            DatabaseUnavailable: the outage outlasted `patience`.
        """

        async def run(connection: Connection) -> list[TupleRow]:
            cursor = await connection.execute(statement, parameters, prepare=prepare)
            return await cursor.fetchall() if cursor.description else []

        return await self._run(run, patience, lambda: True)

    async def fetch_once(
        self, statement: bytes, parameters: dict[str, Any], *, patience: float = 2.0
    ) -> list[TupleRow]:
        """As `fetch`, for a statement that would tell something else when it ran twice: its connection is tried first.

        Raises:
            DatabaseUnavailable: there was no connection within `patience` seconds, or the statement took longer; it may
                have been committed.
        """
        begun = False

        async def run(connection: Connection) -> list[TupleRow]:
            nonlocal begun
            await connection.execute("")
            begun = True
            return await (await connection.execute(statement, parameters)).fetchall()

        return await self._run(run, patience, lambda: not begun)

    async def transaction(self, work: Callable[[Connection], Awaitable[T]], *, patience: float = 2.0) -> T:
        """Do `work` in one transaction, and what it returns. It begins again only where it could not begin.

        Raises:
            DatabaseUnavailable: there was no connection within `patience` seconds, or the transaction took longer; it
                may have been committed.
        """
        begun = False

        async def run(connection: Connection) -> T:
            nonlocal begun
            async with connection.transaction():
                begun = True
                return await work(connection)

        return await self._run(run, patience, lambda: not begun)

    async def _run(self, work: Callable[[Connection], Awaitable[T]], patience: float, again: Callable[[], bool]) -> T:
        """Try until it succeeds. In a task of its own, since the pool loses a connection whose borrower is cancelled
        while it is handed out or taken back. Whoever is cancelled here goes when nothing of theirs runs any more."""
        state = _State()
        task = asyncio.create_task(self._try(work, patience, again, state), name="mcp_pg_events.statement")
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            # Not `shield`: from Python 3.14 on that logs an error that nobody waits for, with what the driver says.
            await asyncio.wait({task})
        except asyncio.CancelledError:
            state.abandoned = True
            task.add_done_callback(_look_at)
            if state.limit is not None:
                state.limit.end_now()
                with anyio.CancelScope(shield=True):
                    await tasks.ended(task)
            raise
        if task.cancelled():
            raise DatabaseUnavailable("The store is being closed; try again")
        return task.result()

    async def _try(
        self, work: Callable[[Connection], Awaitable[T]], patience: float, again: Callable[[], bool], state: _State
    ) -> T:
        loop = asyncio.get_running_loop()
        began = loop.time()
        deadline = began + patience
        pause = 0.0
        while True:
            try:
                async with self._pool.connection(timeout=max(0.1, deadline - loop.time())) as connection:
                    if state.abandoned:
                        raise asyncio.CancelledError
                    with Limit(connection, max(0.1, deadline - loop.time())) as state.limit:
                        try:
                            result = await work(connection)
                            self._answered = loop.time()
                            return result
                        except errors.ReadOnlySqlTransaction:
                            # What this connection leads to takes no writes; the next one may lead elsewhere.
                            await connection.close()
                            raise
                        finally:
                            state.limit = None
            except PoolTimeout as error:
                # The database answers others: this is no outage but a queue.
                if loop.time() - self._answered > 1.0 or loop.time() - began > QUEUE_PATIENCE:
                    raise translate(error) from error
                deadline = loop.time() + patience
            except (psycopg.Error, OSError) as error:
                if not is_outage(error) or loop.time() + pause >= deadline:
                    raise translate(error) from error
                if not again() and not isinstance(error, _UNDONE):
                    raise translate(error) from error
            if state.abandoned:
                raise asyncio.CancelledError
            await asyncio.sleep(pause)
            pause = min(0.5, pause * 2 or 0.02)


@dataclass(slots=True)
class _State:
    """A statement's: whether anybody still waits for it, and the bound on what runs of it."""

    abandoned: bool = False
    limit: Limit | None = None


def _look_at(task: asyncio.Task[Any]) -> None:
    """How it ended is of interest to nobody, which is no reason to say so in the log."""
    if not task.cancelled():
        task.exception()


class _Sparingly(logging.Filter):
    """Of what our pool says of attempts to connect, one line a minute of each kind: an outage has hundreds."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if str(record.msg).startswith("discarding closed connection"):
            # It was closed here, on purpose.
            return False
        arguments = record.args
        if not (isinstance(arguments, tuple) and arguments and arguments[0] == POOL_NAME):
            return True
        text = " ".join(record.getMessage().split())
        if text.startswith("reconnection attempt"):
            return False
        now = time.monotonic()
        if now - self._said.get(text, -60.0) < 60.0:
            return False
        if len(self._said) > 100:
            self._said.clear()
        self._said[text] = now
        record.msg, record.args = text, ()
        return True


def _quieten_pool() -> None:
    pool = logging.getLogger("psycopg.pool")
    if not any(isinstance(found, _Sparingly) for found in pool.filters):
        pool.addFilter(_Sparingly())
