"""What a worker can say of itself without hurting anybody: `store.health()`, and the two routes for whoever asks.

A *live* route answers as long as the event loop runs, whatever the database does: who restarts processes by it must not
restart all of them since PostgreSQL is away. A *ready* route says whether this worker should be sent requests now.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from . import tasks
from .database import Database
from .errors import ConfigurationError
from .queries import Queries

if TYPE_CHECKING:
    from .store import PostgresStore

__all__ = ["LIVE", "READY", "Health", "Probe", "Status", "check_paths", "health_routes"]

LIVE: Final = "/livez"
READY: Final = "/readyz"

FRESH: Final = 0.5
"""For how long the database's last answer is taken for its next one, in seconds: whoever may ask asks for nothing."""

Status = Literal["ready", "starting", "draining", "renewing", "unavailable"]


class Health(NamedTuple):
    """A worker at one moment, as `PostgresStore.health()` gives it."""

    worker: int | None
    """Its number in the table `workers`; None before the store is open, and after it was closed."""
    database: bool
    """Whether the database answered, and takes writes."""
    listening: bool
    """Whether wake-ups from other workers arrive; without them what comes from there is up to `poll_interval` late."""
    draining: bool
    """Whether this worker is on its way out."""
    renewing: bool
    """Whether it was declared dead, or gave its calls up after an outage, and has no new number yet."""
    stalled: float
    """For how many seconds the database has taken no events that wait to be stored; 0 while it takes them."""
    calls: int
    """Calls that run here."""
    readers: int
    """Responses that are open here."""
    sessions: int
    """Sessions with an object in this process: those that it has met, and that have not ended."""

    @property
    def status(self) -> Status:
        """One word: `ready`, or why this worker should be sent no requests now."""
        if self.draining:
            return "draining"
        if self.worker is None:
            return "starting"
        if not self.database:
            return "unavailable"
        return "renewing" if self.renewing else "ready"

    @property
    def ready(self) -> bool:
        """Whether this worker should be sent requests now."""
        return self.status == "ready"


class Probe:
    """Asks the database whether it takes writes: one question at a time, whoever waits for the answer."""

    def __init__(self, database: Database, queries: Queries) -> None:
        self._database = database
        self._queries = queries
        self._asking: asyncio.Task[None] | None = None
        self._answer = False
        self._answered_at = float("-inf")

    async def __call__(self, timeout: float) -> bool:
        """The answer; False when there is none within `timeout` seconds."""
        now = asyncio.get_running_loop().time
        if now() - self._answered_at > FRESH:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask(), name="mcp_pg_events.probe")
            # Not cancelled when the time is up: an answer that comes late serves whoever asks next.
            _, asking = await asyncio.wait([self._asking], timeout=timeout)
            if asking:
                # It may wait for a connection, while the database answers others.
                return self._database.answered_within(1.0)
        return self._answer

    async def _ask(self) -> None:
        answer = False
        with contextlib.suppress(Exception):  # whatever it is, the answer is no
            answer = bool((await self._database.fetch(self._queries.takes_writes, patience=1.0))[0][0])
        self._answer, self._answered_at = answer, asyncio.get_running_loop().time()

    async def stop(self) -> None:
        await tasks.end(self._asking)


def health_routes(store: PostgresStore, *, live: str | None = LIVE, ready: str | None = READY) -> list[Route]:
    """The routes that `mcp-pg-events serve` offers, for an app of your own; a path of None leaves one out.

    `live` answers 200 as long as the event loop runs. `ready` answers 200, or 503 while the store is not open,
    while it drains, and while the database is away. The body says which in one word. Put them where nobody has to log
    in.

    Raises:
        ConfigurationError: a path that does not begin with a slash, or both the same.
    """
    check_paths(live, ready)

    async def answer_live(request: Request) -> JSONResponse:
        return _answer(200, "live")

    async def answer_ready(request: Request) -> JSONResponse:
        health = await store.health()
        return _answer(200 if health.ready else 503, health.status)

    offered = ((live, answer_live), (ready, answer_ready))
    return [Route(path, endpoint, name=endpoint.__name__) for path, endpoint in offered if path is not None]


def check_paths(live: str | None, ready: str | None) -> None:
    """Raise `ConfigurationError` for what `health_routes` cannot take."""
    for path in (live, ready):
        if path is not None and not path.startswith("/"):
            raise ConfigurationError(f"The path {path!r} has to begin with a slash.")
    if live is not None and live == ready:
        raise ConfigurationError(f"The live and the ready route need two paths, not {live!r} for both.")


def _answer(status: int, word: str) -> JSONResponse:
    return JSONResponse({"status": word}, status_code=status, headers={"cache-control": "no-store"})
