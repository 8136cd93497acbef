"""The parts of one worker, wired together and kept alive between entering a store and leaving it.

The way of the data is `http` → `sessions` → `session` → `log` → `writer` → `hub` and `waker` → `listener` → `reader`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psycopg

from . import chores, tasks, telemetry
from .appends import Identity
from .arrays import TextArray
from .backend import App
from .bound import BoundSessions
from .database import Connection, Database, connect, translate
from .errors import DatabaseUnavailable, Error, NotMigrated, SchemaTooOld, WorkerTooOld
from .fetcher import Fetcher
from .finish import Finisher
from .health import Health, Probe
from .hub import Hub
from .inbox import CarriedStream, Inbox
from .listener import Listener
from .log import Log
from .opener import Opener
from .queries import Queries
from .relayed import RelayedSessions
from .schema import NEEDS, REVISION, quote_schema
from .telemetry import Counts
from .waker import Waker
from .watch import Watch
from .writer import Writer

__all__ = ["Worker", "WorkerSettings"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a `PostgresStore` was given, checked. Time-outs in seconds."""

    dsn: str
    listen_dsn: str
    schema: str
    max_connections: int
    prepare_threshold: int | None
    outage_timeout: float
    drain_timeout: float
    unresponsive_timeout: float
    retention: timedelta | None = None


class Worker:
    """One worker's identity, connections and background tasks."""

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self.apps: list[App] = []
        self.hub = Hub()
        self.identity = Identity(0)
        self._queries = Queries(settings.schema)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._renewal: asyncio.Task[None] | None = None
        self._stopping = False
        self._given_up: dict[int, str] = {}
        self._outages_noted: dict[str, float] = {}
        self._prepare_threshold = settings.prepare_threshold
        self._unobserve: Callable[[], None] = lambda: None

    async def start(self) -> None:
        settings, queries = self._settings, self._queries
        first = await connect(settings.dsn, prepare_threshold=None)
        try:
            schema_oid = await self._check(first)
        finally:
            await first.close()
        self.database = Database(
            settings.dsn,
            max_connections=settings.max_connections,
            prepare_threshold=self._prepare_threshold,
            first=queries.note_timeline,
        )
        await self.database.open()
        self.probe = Probe(self.database, queries)
        prefix = f"mcp_pg_events_{schema_oid}_"
        await self.database.fetch(queries.ensure_partitions, {"ahead": chores.PARTITIONS_AHEAD}, patience=5)
        self.waker = Waker(self._connect, queries, self.identity, prefix)
        self.writer = Writer(
            self._connect,
            queries,
            self.identity,
            self.hub,
            self.waker.add,
            outage_timeout=settings.outage_timeout,
            on_lost=self._lost,
            on_broken=lambda stream, reason: self.spawn(self._finish([stream], reason)),
        )
        self.finisher = Finisher(
            self.database, queries, self.identity, self.hub, self.waker.add, self._session_ended, prefix
        )
        self.fetcher = Fetcher(self._connect, self.database, queries, prepares=self._prepare_threshold is not None)
        self.opener = Opener(
            self._connect, queries, self.identity, lambda stale: self.spawn(self.touch_sessions(stale))
        )
        self.log = Log(
            self.database,
            queries,
            self.identity,
            self.writer,
            self.opener,
            self.fetcher,
            self.finisher,
            self.hub,
            prefix,
        )
        self.inbox = Inbox(self.database, queries, self.identity, self._deliver)
        self.bound = BoundSessions(self.database, queries, self.identity, self.log, self.hub, self.inbox, prefix)
        self.relayed = RelayedSessions(self.database, queries, self.identity, self.log, self.hub, self.writer)
        self.listener = Listener(
            lambda: connect(settings.listen_dsn, prepare_threshold=None),
            self.database,
            queries,
            self.identity,
            prefix,
            schema_oid,
            on_notification=self._notified,
            on_resync=self._resync,
        )
        self.watch = Watch(
            self.database,
            queries,
            self.identity,
            self.listener,
            self.finisher,
            unresponsive_timeout=settings.unresponsive_timeout,
            on_declared_dead=self.writer.declared_dead,
            on_fenced=self.writer.look_for_ended,
        )
        await self.listener.start()
        await self.waker.start()
        await self.writer.start()
        await self.opener.start()
        await self.fetcher.start()
        self.inbox.start()
        self.watch.start()
        self.spawn(chores.make_partitions(self.database, queries))
        if settings.retention is not None:
            self.spawn(chores.retain(self.database, queries, settings.retention))
        self.spawn(chores.finish_orphans(self.database, queries, self.identity, self.writer, self._finish))
        self._unobserve = telemetry.observe(self.counts)
        logger.info("Worker %d serves schema %s", self.identity.number, settings.schema)

    async def stop(self) -> None:
        self._unobserve()
        for name in ("watch", "inbox", "opener", "probe"):
            if (part := getattr(self, name, None)) is not None:
                await part.stop()
        # A worker that loses its identity now takes no new one.
        self._stopping = True
        await tasks.end(self._renewal, *self._tasks)
        if (writer := getattr(self, "writer", None)) is not None:
            try:
                async with asyncio.timeout(5):
                    await writer.stop()
            except TimeoutError:
                logger.error("Events were still waiting for the database when the store was closed")
        number = self.identity.number
        # Also the calls that nobody drained.
        await self._give_up(number, "shutdown", patience=1)
        for name in ("fetcher", "waker", "listener"):
            if (part := getattr(self, name, None)) is not None:
                await part.stop()
        if self.identity.number != number:
            # That was on its way while this worker stopped.
            await self._give_up(self.identity.number, "shutdown", patience=1)
        if (database := getattr(self, "database", None)) is not None:
            await database.close()

    async def _connect(self) -> Connection:
        return await connect(
            self._settings.dsn, prepare_threshold=self._prepare_threshold, first=self._queries.note_timeline
        )

    async def _check(self, connection: Connection) -> int:
        """Whether this worker and the database fit, and the schema's oid."""
        schema = self._settings.schema
        try:
            cursor = await connection.execute(self._queries.revisions, {"schema": quote_schema(schema)})
            row = await cursor.fetchone()
        except psycopg.Error as error:
            if isinstance(translate(error), NotMigrated):
                raise NotMigrated(
                    f"The database has no schema {schema!r} of mcp_pg_events; run `mcp-pg-events migrate`"
                    + ("" if schema == "mcp_events" else f" with `--schema {schema}`")
                ) from None
            raise translate(error) from None
        assert row is not None
        revision, oldest_worker, schema_oid, standby, backend = row
        if revision is None or oldest_worker is None or revision < NEEDS:
            raise SchemaTooOld(
                f"The database's schema {schema!r} is at revision {revision or 'none'}, but this version needs "
                f"{NEEDS}; run `mcp-pg-events migrate`"
            )
        if oldest_worker > REVISION:
            raise WorkerTooOld(
                f"The database's schema {schema!r} is at revision {revision} and serves workers from revision "
                f"{oldest_worker} on, but this one is of revision {REVISION}; upgrade it with "
                "`pip install --upgrade mcp-pg-events`"
            )
        if standby:
            raise DatabaseUnavailable("The DSN leads to a standby, which takes no writes; give the primary")
        if self._prepare_threshold is not None and backend != connection.info.backend_pid:
            # A pooler makes up the process number that its client is told.
            logger.warning(
                "The DSN leads through a connection pooler, so no statement is prepared; prepare_threshold=None "
                "says so, and spares this line"
            )
            self._prepare_threshold = None
        return int(schema_oid)

    async def _finish(self, streams: list[int], reason: str) -> None:
        try:
            await self.finisher.finish_own(streams, reason)
        except Error as error:
            logger.warning("%d calls could not be ended yet: %s", len(streams), error)

    # --- what arrives -------------------------------------------------------------------------------------------------

    def _notified(self, payload: str) -> None:
        kind, rest = payload[:1], payload[1:]
        match kind:
            case "s":
                for stream in rest.split(","):
                    self.hub.wake(int(stream))
            case "k":
                stream, _, generation = rest.partition(":")
                self.hub.supersede(int(stream), int(generation))
            case "a":
                stream, _, generation = rest.partition(":")
                self.writer.calls.attached(int(stream), int(generation), here=False)
                # Also for what was committed before this came, and for a stream that has ended since.
                self.waker.add({int(stream)})
            case "c":
                self.hub.end_stream(int(rest), "closed")
            case "i":
                self.inbox.check()
            case "e":
                self._session_ended(rest)
            case "u":
                for app in self.apps:
                    app.session_changed(rest)
            case _:
                logger.debug("An unknown notification was ignored")

    def _resync(self) -> None:
        self.hub.wake_all()
        self.inbox.check()
        self.writer.doubt_readers()
        self.writer.look_for_ended()

    def _deliver(self, session_id: str, payload: str, carried: CarriedStream | None) -> None:
        stream = None
        if carried is not None:
            stream = self.log.own(
                self.identity.number,
                carried.epoch,
                carried.number,
                session_id,
                carried.created_at,
                carried.request_key,
            )
            # Its client asked another worker, and reads there.
            stream.read_elsewhere = True
        if not any([app.receive(session_id, payload, stream) for app in self.apps]):
            if stream is not None:
                self.writer.ended_elsewhere(stream.number)
                self.spawn(self._finish([stream.number], "session_ended"))
            logger.info("Session %s: a message came after what it was about had ended here", session_id)

    def _session_ended(self, session_id: str) -> None:
        self.hub.end_session(session_id)
        for app in self.apps:
            app.session_ended(session_id)
        # What runs of it meets the fence with its next event, which may never come.
        if self.writer.calls.numbers(lambda: {session_id}):
            self.writer.look_for_ended()

    async def touch_sessions(self, sessions: set[str] | None = None) -> None:
        """Keep sessions from their idle time-out: those given, or those with a running call or an attached reader."""
        if sessions is None:
            sessions = self.writer.calls.sessions() | self.hub.sessions()
        if sessions:
            await self.database.fetch(
                self._queries.touch_sessions, {"sessions": TextArray(session.encode() for session in sessions)}
            )

    async def health(self, timeout: float, *, draining: bool) -> Health:
        """How this worker is; the database has `timeout` seconds to answer."""
        database = await self.probe(timeout)
        stalled_since = self.writer.stall.since
        return Health(
            worker=self.identity.number,
            database=database,
            listening=self.listener.up_since is not None,
            draining=draining,
            renewing=self.writer.lost,
            stalled=0.0 if stalled_since is None else asyncio.get_running_loop().time() - stalled_since,
            **self.counts()._asdict(),
        )

    def counts(self) -> Counts:
        """What there is of each here; also called from another thread."""
        return Counts(len(self.writer.calls), len(self.hub), sum(app.sessions() for app in list(self.apps)))

    # --- losing the identity ------------------------------------------------------------------------------------------

    def _lost(self, error: Error) -> None:
        """This worker was declared dead, or gave its calls up. It goes on as another one."""
        logger.error("Worker %d lost its calls: %s", self.identity.number, error)
        self.hub.send_away()
        for app in self.apps:
            app.end_all()
        if not self._stopping and (self._renewal is None or self._renewal.done()):
            reason = "outage" if isinstance(error, DatabaseUnavailable) else "worker_lost"
            self._renewal = asyncio.create_task(self._renew(reason), name="mcp_pg_events.renew")

    async def _renew(self, reason: str) -> None:
        while self.writer.lost:
            old = self.identity.number
            self._given_up.setdefault(old, reason)
            await self.listener.renew()
            self.writer.renew()
            logger.warning("Worker %d goes on as worker %d", old, self.identity.number)
            for _ in range(20):
                if await self._give_up(old, reason):
                    break
                await asyncio.sleep(0.5)

    async def _give_up(self, number: int, reason: str, *, patience: float = 5.0) -> bool:
        """End a number that was this worker's, its calls, and those that could not be ended yet; whether all were."""
        self._given_up.setdefault(number, reason)
        if (finisher := getattr(self, "finisher", None)) is None:
            return True
        try:
            for old, why in list(self._given_up.items()):
                await finisher.end_worker(old, why, patience=patience)
                del self._given_up[old]
        except Error as error:
            logger.debug("The calls of worker %d could not be ended yet: %s", number, error)
        return not self._given_up

    # --- odds and ends ------------------------------------------------------------------------------------------------

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        async def run() -> None:
            try:
                await work
            except Error as error:
                logger.debug("Something in the background failed: %s", error)
            except Exception:
                logger.exception("Something in the background failed")

        task = asyncio.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note_outage(self, error: Error) -> None:
        """A request met an outage: one line for all that meet the same within some seconds of each other."""
        now = asyncio.get_running_loop().time()
        if len(self._outages_noted) > 100:
            self._outages_noted.clear()
        if now - self._outages_noted.get(str(error), -11.0) > 10.0:
            logger.warning("Requests are refused for now: %s", error)
        self._outages_noted[str(error)] = now
