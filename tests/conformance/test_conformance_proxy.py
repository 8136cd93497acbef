"""The official conformance suite through the HTTP proxy: one replica, and two in turn.

Behind it is the everything-server as the SDK made it, with nothing of this package; with event ids of its own it keeps
them in memory. Behind another is `@modelcontextprotocol/server-everything`, which does not know the suite: what it
passes alone it has to pass through the proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conformance.everything_server import RETRY_INTERVAL
from tests.conformance.test_conformance import PROVOKED, SERVER, assert_passed, read_results, run_suite
from tests.support.haproxy import round_robin
from tests.support.node import Node, install_everything
from tests.support.postgres import die_with_parent, free_port
from tests.support.until import until
from tests.support.workers import Workers, run_workers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]


@contextlib.asynccontextmanager
async def proxied(dsn: str, upstream: str, count: int) -> AsyncIterator[Workers]:
    options = {"loopback": True, "proxy": {"retry": RETRY_INTERVAL}}
    async with run_workers("proxied_app", dsn, count, environment={"TEST_UPSTREAM": upstream}, options=options) as made:
        yield made
        made.assert_clean_logs(*PROVOKED)


@dataclass(frozen=True, slots=True)
class Everything:
    """The everything-server without `durable`, and how many checks it passes through the proxy."""

    url: str
    passed: int


@pytest.fixture(scope="module", params=["resumable", pytest.param("plain", marks=pytest.mark.slow)])
async def upstream(request: pytest.FixtureRequest, anyio_backend: str) -> AsyncIterator[Everything]:
    """`resumable` gives its events ids, and passes 84 alone. `plain` does not, and passes 81: the proxy primes its
    streams and gives the hint that it lacks, but a tool cannot have it end its response."""
    resumable = request.param == "resumable"
    environment = {"EVERYTHING_EVENT_IDS": "1"} if resumable else {}
    async with run_workers(SERVER, None, 1, environment=environment) as workers:
        yield Everything(f"{workers[0].url}/mcp", 84 if resumable else 83)


async def test_the_2025_11_25_suite_passes_through_two_replicas_in_turn(
    upstream: Everything, node: Node, migrated: str, tmp_path: Path
) -> None:
    async with proxied(migrated, upstream.url, 2) as replicas, round_robin(replicas.urls) as proxy:
        checks = await run_suite(node, "2025-11-25", proxy.url, tmp_path)
        assert_passed(checks, scenarios=33, passed=upstream.passed)
        one, other = await proxy.served()
        assert abs(one - other) <= 1


@pytest.mark.slow  # two replicas are the harder case
async def test_the_2025_11_25_suite_passes_through_one_replica(
    upstream: Everything, node: Node, migrated: str, tmp_path: Path
) -> None:
    async with proxied(migrated, upstream.url, 1) as replicas:
        checks = await run_suite(node, "2025-11-25", replicas[0].url, tmp_path)
        assert_passed(checks, scenarios=33, passed=upstream.passed)


async def test_the_2026_07_28_suite_passes_through_two_replicas_in_turn(
    node: Node, migrated: str, tmp_path: Path
) -> None:
    # One upstream, whatever replica a request comes by: also what the SDK's subscriptions are asked for passes.
    async with run_workers(SERVER, None, 1) as workers:
        async with (
            proxied(migrated, f"{workers[0].url}/mcp", 2) as replicas,
            round_robin(replicas.urls) as proxy,
        ):
            checks = await run_suite(node, "2026-07-28", proxy.url, tmp_path)
            assert_passed(checks, scenarios=40, passed=152)


async def suite_on_another(node: Node, url: str, output: Path) -> set[tuple[str, str, str]]:
    """What the suite finds of a server that was not made for it."""
    await asyncio.to_thread(output.mkdir)
    with contextlib.suppress(AssertionError):  # scenarios that count fail
        await run_suite(node, "2025-11-25", url, output)
    return {(check.scenario, check.id, check.status) for check in read_results(output)}


@pytest.mark.slow
async def test_server_everything_passes_through_two_replicas_what_it_passes_alone(
    node: Node, migrated: str, tmp_path: Path
) -> None:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(*install_everything(), "streamableHttp"),
        env={**os.environ, "PORT": str(port)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        preexec_fn=die_with_parent(9),
    )
    try:

        async def accepts() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            return True

        await until(accepts, 20)
        url = f"http://127.0.0.1:{port}"
        alone = await suite_on_another(node, url, tmp_path / "alone")
        async with proxied(migrated, f"{url}/mcp", 2) as replicas, round_robin(replicas.urls) as proxy:
            through = await suite_on_another(node, proxy.url, tmp_path / "through")
    finally:
        process.kill()
        await process.wait()
    passed_alone = {(scenario, check) for scenario, check, status in alone if status == "SUCCESS"}
    passed = {(scenario, check) for scenario, check, status in through if status == "SUCCESS"}
    print(f"alone: {len(passed_alone)} of {len(alone)} checks; through the proxy: {len(passed)} of {len(through)}")
    assert passed_alone - passed == set()
    assert len(passed_alone) > 10
