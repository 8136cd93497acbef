"""The official conformance suite against an everything-server that is durable.

One worker shows that being durable changes nothing that the protocol promises; two, with every request on the next one,
that it does not matter either which worker a client meets. The suite counts "checks"; a scenario has several.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.haproxy import RoundRobin, round_robin
from tests.support.node import Node
from tests.support.postgres import create_database, database_name, drop_database
from tests.support.workers import Workers, run_workers

# The first test of a machine has npm download its packages.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

SERVER = "tests.conformance.everything_server"
RESULTS = re.compile(r"server-(?P<scenario>.+)-\d{4}-\d\d-\d\dT[0-9-]+Z")

PROVOKED = (r"Invalid Host header: evil\.example\.com", r"requestState rejected on tools/call: (malformed|seal)")
"""What the suite has the server warn of."""

NOT_ACROSS_WORKERS = {
    "sep-2575-server-sends-prompts-list-changed-on-subscription",
    "sep-2575-server-sends-tools-list-changed-on-subscription",
}
"""What a server of the 2026-07-28 revision *should* do, and on several workers does not: `durable` passes that revision
on to the SDK, whose subscriptions know the listeners of one process."""


@dataclass(frozen=True, slots=True)
class Check:
    """What the suite found. `status` is SUCCESS, FAILURE, WARNING (for what only should be), SKIPPED or INFO."""

    scenario: str
    id: str
    status: str


@pytest.fixture(scope="module")
async def workers(node: Node, postgres_dsn: str, migrated_template: str, anyio_backend: str) -> AsyncIterator[Workers]:
    """A process of the everything-server on a database of its own; `two_workers` adds another."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    try:
        async with run_workers(SERVER, dsn, 1) as started:
            yield started
            started.assert_clean_logs(*PROVOKED)
    finally:
        drop_database(postgres_dsn, dsn)


@pytest.fixture(scope="module")
async def two_workers(workers: Workers) -> AsyncIterator[RoundRobin]:
    """Two processes behind haproxy."""
    await workers.add()
    async with round_robin(workers.urls) as proxy:
        yield proxy


async def run_suite(node: Node, requirements: str, url: str, output: Path) -> list[Check]:
    """Run the scenarios that a revision of the protocol requires, and what else the suite has to say about it.

    Raises:
        AssertionError: a scenario that counts has failed.
    """
    process = await asyncio.create_subprocess_exec(
        *node.conformance,
        *("server", "--url", f"{url}/mcp", "--requirements", requirements, "--output-dir", str(output)),
        cwd=output,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        said, _ = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert process.returncode == 0, said.decode()[-8000:]
    return read_results(output)


def read_results(output: Path) -> list[Check]:
    """What the suite wrote, a folder for each scenario."""
    return [
        Check(match["scenario"], check["id"], check["status"])
        for folder in output.iterdir()
        if (match := RESULTS.fullmatch(folder.name))
        for check in json.loads((folder / "checks.json").read_text())
    ]


def assert_passed(checks: list[Check], *, scenarios: int, passed: int, warned: Collection[str] = ()) -> None:
    """Every check ended well, but those that the suite `warned` of, and there were as many as there should be."""
    checks = [check for check in checks if not check.scenario.startswith("tasks-")]  # the SDK (2.3.0) has no tasks
    assert {check.id for check in checks if check.status in ("FAILURE", "WARNING")} == set(warned)
    assert len({check.scenario for check in checks}) == scenarios
    assert sum(check.status == "SUCCESS" for check in checks) == passed


async def test_the_2025_11_25_suite_passes_on_one_worker(node: Node, workers: Workers, tmp_path: Path) -> None:
    checks = await run_suite(node, "2025-11-25", workers[0].url, tmp_path)
    assert_passed(checks, scenarios=33, passed=84)


async def test_the_2026_07_28_suite_passes_on_one_worker(node: Node, workers: Workers, tmp_path: Path) -> None:
    checks = await run_suite(node, "2026-07-28", workers[0].url, tmp_path)
    assert_passed(checks, scenarios=40, passed=152)


async def test_the_2025_11_25_suite_passes_on_two_workers_in_turn(
    node: Node, two_workers: RoundRobin, tmp_path: Path
) -> None:
    checks = await run_suite(node, "2025-11-25", two_workers.url, tmp_path)
    assert_passed(checks, scenarios=33, passed=84)
    one, other = await two_workers.served()
    assert abs(one - other) <= 1


async def test_the_2026_07_28_suite_passes_on_two_workers_in_turn(
    node: Node, two_workers: RoundRobin, tmp_path: Path
) -> None:
    checks = await run_suite(node, "2026-07-28", two_workers.url, tmp_path)
    assert_passed(checks, scenarios=40, passed=150, warned=NOT_ACROSS_WORKERS)
    one, other = await two_workers.served()
    assert abs(one - other) <= 1
