"""What the instruments cost where nobody collects them: their share of an append's processor time.

One caller alone is the worst case: each of its batches is one event, and whatever is recorded is recorded by the batch.
What an append records is called by itself in a loop, and held against the processor time of a whole append.
"""

from __future__ import annotations

import asyncio
import timeit

from mcp_pg_events import PostgresStore, telemetry
from tests.benchmarks.environment import Bench
from tests.benchmarks.figures import OURS, Report
from tests.benchmarks.storing import drive, own_streams

TITLE = "What unused metrics cost"
RECORDED = "recorded for a batch"
CASE = "1 caller"


def run(bench: Bench, report: Report) -> None:
    with bench.database() as dsn:
        asyncio.run(_run(bench, report, dsn))
    report.compare("share of an append", (CASE, RECORDED, "cpu_us"), (CASE, OURS, "cpu_us"), "at most", 0.02)


async def _run(bench: Bench, report: Report, dsn: str) -> None:
    clock = asyncio.get_running_loop().time
    async with PostgresStore(dsn) as store:
        for _ in range(bench.rounds):
            _, _, used = await drive(await own_streams(store, 1), 1, 2.0)
            report.add(CASE, OURS, cpu_us=used * 1e6)

            def record() -> None:
                # The times of the first event, of the batch and of the commit; and one write to the client.
                clock(), clock(), telemetry.stored(1, clock())
                telemetry.delivered(0.001)

            turns = 100_000
            report.add(CASE, RECORDED, cpu_us=timeit.timeit(record, number=turns) / turns * 1e6)
