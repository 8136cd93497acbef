"""What a worker does now and then, whatever its clients do: partitions ahead, retention, calls that nobody runs.

Each runs until it is cancelled, and takes an outage in its stride. Next: `worker.py` starts them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

from . import telemetry
from .appends import Identity
from .database import Database
from .errors import Error
from .queries import Queries
from .writer import Writer

__all__ = ["PARTITIONS_AHEAD", "finish_orphans", "make_partitions", "retain"]

logger = logging.getLogger(__name__)

PARTITIONS_AHEAD: Final = 2
ORPHAN_CHECK: Final = 10.0
RETENTION_FIRST: Final = 10.0
RETENTION_INTERVAL: Final = 3600.0
RETENTION_PATIENCE: Final = 60.0
PARTITION_CHECK: Final = timedelta(minutes=10)


async def make_partitions(database: Database, queries: Queries) -> None:
    """Partitions ahead of the clock, again and again."""
    while True:
        await asyncio.sleep(PARTITION_CHECK.total_seconds())
        try:
            await database.fetch(queries.ensure_partitions, {"ahead": PARTITIONS_AHEAD})
        except Error as error:
            logger.warning("Partitions could not be made ahead: %s", error)


async def retain(database: Database, queries: Queries, ttl: timedelta) -> None:
    """Pass by pass; where several workers would at once, the database lets one."""
    pause = RETENTION_FIRST
    while True:
        await asyncio.sleep(pause)
        pause = RETENTION_INTERVAL
        began = asyncio.get_running_loop().time()
        try:
            with telemetry.span("retention"):
                rows = await database.fetch(queries.drop_expired, {"ttl": ttl}, patience=RETENTION_PATIENCE)
        except Error as error:
            logger.warning("Old events could not be removed: %s", error)
            continue
        if rows:
            if any(result not in ("contended", "detach pending") for _, result in rows):
                # There may be more: a call does one step, so that it holds nobody up for long.
                pause = RETENTION_FIRST
            telemetry.retention_step(asyncio.get_running_loop().time() - began, rows)
            logger.info("Retention: %s", ", ".join(f"{what} {result}" for what, result in rows))


async def finish_orphans(
    database: Database,
    queries: Queries,
    identity: Identity,
    writer: Writer,
    finish: Callable[[list[int], str], Awaitable[None]],
) -> None:
    """End the open calls that nobody runs: their end could not be written, or their opening's answer was lost."""
    while True:
        await asyncio.sleep(ORPHAN_CHECK)
        try:
            rows = await database.fetch(queries.orphans, {"me": identity.number})
        except Error as error:
            logger.debug("Open calls were not looked over: %s", error)
            continue
        orphans = [number for (number,) in rows if not writer.calls.owns(number)]
        if orphans and not writer.lost:
            logger.warning("Ending %d calls that nobody runs", len(orphans))
            await finish(orphans, "not_stored")
