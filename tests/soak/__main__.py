"""`python -m tests.soak [--seconds S] [--workers N] [--clients N] [--sdk-clients N] [--seed N]`: see the package."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
import traceback
from collections.abc import Awaitable
from pathlib import Path

from tests.soak import check, report
from tests.soak.clients import DEADLINE, RawClient
from tests.soak.faults import Faults
from tests.soak.sdk_clients import SdkClient
from tests.soak.stage import SILENCE, Stage, now, stage
from tests.support import mcp_http


async def guarded(name: str, work: Awaitable[None], running: Stage) -> None:
    """A client or a fault that fails is a finding, and not the end of the soak."""
    try:
        await work
    except Exception:
        running.violation(f"{name} failed:\n{traceback.format_exc()}")


async def told(running: Stage) -> None:
    """A line every now and then."""
    while True:
        await asyncio.sleep(15)
        ended = [call for call in running.calls if call.outcome]
        print(
            f"{now():%H:%M:%S} {len(ended)} calls ended, {len(running.calls) - len(ended)} run; "
            f"{len(running.faults)} faults; {len(running.violations)} promises broken",
            flush=True,
        )


async def soak(given: argparse.Namespace) -> list[str]:
    """Run it: the report's lines, and on the way what was broken."""
    mcp_http.TIMEOUT = SILENCE
    async with stage(given.workers) as running:
        [(postgresql,)] = await running.server.execute("SHOW server_version")
        print(f"Seed {given.seed}; {report.versions(postgresql)}", flush=True)
        clients = [RawClient(n, running, random.Random(f"{given.seed} raw {n}")) for n in range(given.clients)]
        clients += [SdkClient(n, running, random.Random(f"{given.seed} sdk {n}")) for n in range(given.sdk_clients)]
        faults = Faults(running, random.Random(f"{given.seed} faults"))
        telling = asyncio.create_task(told(running))
        working = [asyncio.create_task(guarded(client.name, client.run(), running)) for client in clients]
        failing = asyncio.create_task(guarded("faults", faults.run(), running))
        began = time.monotonic()
        await asyncio.sleep(given.seconds * 0.6)
        if given.outage:
            await faults.outage()
        await asyncio.sleep(max(0.0, began + given.seconds - time.monotonic()))
        running.over.set()
        await failing
        _, hanging = await asyncio.wait(working, timeout=2 * DEADLINE)
        for task in hanging:
            running.violation("a client does not come to its end")
            task.cancel()
        await asyncio.gather(*hanging, return_exceptions=True)
        await asyncio.wait_for(running.settled(), DEADLINE)
        await check.quiet(running)
        findings = await check.examine(running)
        await running.workers.stop()
        await check.examine_ends(running, findings)
        telling.cancel()
        if given.logs is not None:
            given.logs.mkdir(parents=True, exist_ok=True)
            for worker in running.workers.members:
                (given.logs / f"{worker.pid}.log").write_text(worker.output())
        running.workers.members.clear()
        for violation in running.violations:
            print(f"BROKEN: {violation}")
        given.broken = len(running.violations)
        return report.lines(running, findings)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Clients, workers, and faults.")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long faults go on (default 600)")
    parser.add_argument("--workers", type=int, default=4, help="default 4")
    parser.add_argument("--clients", type=int, default=20, help="raw ones (default 20)")
    parser.add_argument("--sdk-clients", type=int, default=4, help="of the SDK (default 4)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="for whatever is left to chance")
    parser.add_argument("--outage", action="store_true", help="also one outage longer than workers wait for")
    parser.add_argument("--logs", type=Path, help="a directory to keep what the workers wrote")
    given = parser.parse_args(arguments)
    print("\n".join(asyncio.run(soak(given))))
    print(f"{'Failed' if given.broken else 'Passed'} with seed {given.seed}.")
    return 1 if given.broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
