"""The public handle on the log: options, life, drain, and the SDK's `EventStore` for one session.

What happens between entering and leaving a store is `worker.py`'s. Next: `durable.py` gives a store to an app.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from datetime import timedelta
from types import TracebackType
from typing import Any, Self, TypedDict

from mcp.server.streamable_http import EventCallback, EventStore
from mcp_types import JSONRPCMessage

from . import telemetry
from .backend import App
from .bound import BoundSessions
from .database import normalise_dsn
from .errors import ConfigurationError, Error, StoreClosed
from .event_store import SessionEventStore
from .health import Health
from .hub import Hub
from .log import Log
from .relayed import RelayedSessions
from .schema import quote_schema
from .worker import Worker, WorkerSettings

__all__ = ["PostgresStore", "StoreOptions", "as_store"]

logger = logging.getLogger(__name__)


class StoreOptions(TypedDict, total=False):
    """The keyword arguments of `PostgresStore`, for `durable(app, dsn, ...)`."""

    listen_dsn: str | None
    schema: str
    max_connections: int
    prepare_threshold: int | None
    outage_timeout: float
    drain_timeout: float
    unresponsive_timeout: float
    retention: timedelta | None


class PostgresStore(EventStore):
    """The log in one PostgreSQL database, as one worker. An async context manager; apps of a process may share it.

    Args:
        dsn: A libpq connection string or URI.
        listen_dsn: A direct connection for LISTEN, where `dsn` goes through a pooler in transaction mode.
        schema: The schema that `mcp-pg-events migrate` made.
        max_connections: Upper bound of the pool for requests. A worker has five connections more: one each to open
            requests' streams, to write, to wake other workers, to read, and to listen.
        prepare_threshold: As in psycopg; None for a pooler that knows no prepared statements.
        outage_timeout: How long (seconds) calls and resuming clients wait for a database that is away.
        drain_timeout: How long (seconds) running calls may go on after SIGTERM.
        unresponsive_timeout: After how long (seconds) without a sign a worker that holds its lock counts as dead.
        retention: How long an event is kept at least, where no job removes old ones: one of the workers does so then.

    Raises:
        ConfigurationError: an option cannot work.

    Entering it raises `DatabaseUnavailable`, `NotMigrated`, `SchemaTooOld`, `WorkerTooOld` or `ListenUnavailable`.

    It is an `EventStore` for one purpose only: given to `event_store=`, it refuses with the way to do it right. The SDK
    never tells an event store which session it serves, so one for all sessions would leak between them.
    """

    def __init__(
        self,
        dsn: str,
        *,
        listen_dsn: str | None = None,
        schema: str = "mcp_events",
        max_connections: int = 3,
        prepare_threshold: int | None = 5,
        outage_timeout: float = 60.0,
        drain_timeout: float = 20.0,
        unresponsive_timeout: float = 60.0,
        retention: timedelta | None = None,
    ) -> None:
        for name, value in (("outage_timeout", outage_timeout), ("unresponsive_timeout", unresponsive_timeout)):
            if not 0 < value < 1e9:
                raise ConfigurationError(f"{name} has to be a positive number of seconds")
        if not 0 <= drain_timeout < 1e9:
            raise ConfigurationError("drain_timeout has to be a number of seconds, 0 or more")
        if unresponsive_timeout < 15:
            raise ConfigurationError("unresponsive_timeout has to be 15 seconds or more: a worker stamps every 5")
        if retention is not None and not timedelta(hours=1) <= retention < timedelta(days=36500):
            raise ConfigurationError("retention has to be an hour or more")
        if max_connections < 1:
            raise ConfigurationError("max_connections has to be 1 or more")
        if prepare_threshold is not None and prepare_threshold < 0:
            raise ConfigurationError("prepare_threshold has to be None, or 0 or more")
        listen_dsn = dsn if listen_dsn is None else listen_dsn
        normalise_dsn(dsn)
        normalise_dsn(listen_dsn)
        quote_schema(schema)
        self._settings = WorkerSettings(
            dsn,
            listen_dsn,
            schema,
            max_connections,
            prepare_threshold,
            outage_timeout,
            drain_timeout,
            unresponsive_timeout,
            retention,
        )
        self._users = 0
        self._starting = asyncio.Lock()
        self._worker: Worker | None = None
        self._drained: asyncio.Task[None] | None = None
        self._drain_from: float | None = None

    # --- life ---------------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        async with self._starting:
            if self._worker is None:
                self._drained = self._drain_from = None
                worker = Worker(self._settings)
                try:
                    await worker.start()
                except BaseException:
                    await worker.stop()
                    raise
                self._worker = worker
            self._users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        async with self._starting:
            self._users -= 1
            if self._users == 0 and self._worker is not None:
                worker, self._worker = self._worker, None
                await worker.stop()

    @property
    def _running_worker(self) -> Worker:
        if self._worker is None:
            raise StoreClosed
        return self._worker

    @property
    def retention(self) -> timedelta | None:
        """How long an event is kept at least; None where workers remove nothing."""
        return self._settings.retention

    @property
    def outage_timeout(self) -> float:
        """How long calls and resuming clients wait for a database that is away, in seconds."""
        return self._settings.outage_timeout

    async def health(self, *, timeout: float = 1.0) -> Health:
        """How this worker is, for a probe or a metric. Never raises, and takes no longer than `timeout` seconds.

        The database is asked with one short statement, at most twice a second however often this is called.
        """
        if self._worker is None:
            return Health(None, False, False, self.draining, False, 0.0, 0, 0, 0)
        return await self._worker.health(timeout, draining=self.draining)

    # --- what the session side uses -----------------------------------------------------------------------------------

    @property
    def log(self) -> Log:
        """The log. Raises `StoreClosed` outside the context."""
        return self._running_worker.log

    @property
    def hub(self) -> Hub:
        """The readers of this worker. Raises `StoreClosed` outside the context."""
        return self._running_worker.hub

    @property
    def bound(self) -> BoundSessions:
        """The log's part for sessions that live on one worker. Raises `StoreClosed` outside the context."""
        return self._running_worker.bound

    @property
    def relayed(self) -> RelayedSessions:
        """The log's part for what a proxy reads from its upstream. Raises `StoreClosed` outside the context."""
        return self._running_worker.relayed

    @property
    def draining(self) -> bool:
        """Whether this worker is on its way out, and takes no new sessions."""
        return self._drain_from is not None

    def worker_number(self) -> int:
        """This worker's number in the database; a new one after it was declared dead."""
        return self._running_worker.identity.number

    def register(self, app: App) -> Callable[[], None]:
        """Tell an app's sessions what comes from other workers; the result takes them out again."""
        apps = self._running_worker.apps
        apps.append(app)
        return lambda: apps.remove(app)

    async def leave(self, sessions: Callable[[], set[str]]) -> None:
        """An app's lifespan ends: the calls of its sessions may finish first. With the last app the worker drains."""
        if self._worker is None:
            return
        if self.draining or len(self._worker.apps) == 1:
            await self.drain()
        else:
            await self._finish_calls(self._worker, sessions)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something that nobody waits for; its failure is logged."""
        self._running_worker.spawn(work)

    def note_outage(self, error: Error) -> None:
        """A request met an outage: one line in the log for all of them."""
        self._running_worker.note_outage(error)

    async def touch_sessions(self) -> None:
        """Keep the sessions with a running call or an attached reader here from their idle time-out."""
        await self._running_worker.touch_sessions()

    async def expire_idle(self, server: str, idle_timeout: float) -> None:
        """End sessions of `server` that were idle for `idle_timeout` seconds by the database's clock."""
        await self._running_worker.finisher.expire_idle(server, idle_timeout)

    # --- going --------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Leave politely: end every response so that clients resume elsewhere, take no new session, let running calls
        finish for `drain_timeout` seconds from the first call of this, then end what is left with an error.

        Returns when no call runs here. SIGTERM does the same where a signal handler can be installed.
        """
        self.begin_drain()
        assert self._drained is not None
        await asyncio.shield(self._drained)

    def begin_drain(self) -> None:
        """Start draining without waiting for it."""
        if self._drained is None:
            self._drain_from = asyncio.get_running_loop().time()
            self._drained = asyncio.create_task(self._drain(self._running_worker), name="mcp_pg_events.drain")

    async def _drain(self, worker: Worker) -> None:
        with telemetry.span("drain"):
            worker.hub.drain()
            for app in worker.apps:
                app.drain()
            await self._finish_calls(worker, None)

    async def _finish_calls(self, worker: Worker, sessions: Callable[[], set[str]] | None) -> None:
        try:
            async with asyncio.timeout(self._settings.drain_timeout):
                await worker.writer.calls.wait(sessions)
        except TimeoutError:
            left = worker.writer.calls.numbers(sessions)
            logger.warning("%d calls did not finish within %s s of draining", len(left), self._settings.drain_timeout)
            try:
                await worker.finisher.finish_own(left, "shutdown")
            except Error as error:
                logger.error("Running calls could not be ended properly: %s", error)
            for number in left:
                worker.writer.ended_elsewhere(number)

    # --- the SDK's EventStore -----------------------------------------------------------------------------------------

    def for_session(self, session_id: str) -> EventStore:
        """The SDK's `EventStore` for one session, for those who wire their own transport.

        The session is made at its first event. Its `replay_events_after` replays, then goes on until the stream's final
        response.

        Raises:
            ConfigurationError: `session_id` is empty or contains U+0000.
        """
        return SessionEventStore(self, session_id)

    def __bool__(self) -> bool:
        """Refuse: the SDK asks this with every request, also of versions for which it stores nothing at first."""
        raise _misused()

    async def store_event(self, stream_id: str, message: JSONRPCMessage | None) -> str:
        """Refuse: see the class."""
        raise _misused()

    async def replay_events_after(self, last_event_id: str, send_callback: EventCallback) -> str | None:
        """Refuse: see the class."""
        raise _misused()


def as_store(store: PostgresStore | str, options: StoreOptions) -> PostgresStore:
    """The store that an app was given, or one of its own for the DSN that it was given.

    Raises:
        ConfigurationError: it is neither, or `options` come with a store.
    """
    if isinstance(store, str):
        return PostgresStore(store, **options)
    if not isinstance(store, PostgresStore):
        raise ConfigurationError("The second argument is a DSN or a PostgresStore")
    if options:
        raise ConfigurationError(f"Give {', '.join(options)} to the PostgresStore, since there is one already")
    return store


def _misused() -> ConfigurationError:
    return ConfigurationError(
        "A PostgresStore cannot be one event_store for all sessions, since the SDK does not say whose event it stores; "
        "use `app = durable(server.streamable_http_app(), store)`, or `store.for_session(session_id)` for one transport"
    )
