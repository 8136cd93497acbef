"""The official conformance suite against the everything-server as a program on stdio, behind two replicas in turn."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.conformance.everything_server import RETRY_INTERVAL
from tests.conformance.test_conformance import assert_passed, run_suite
from tests.support.haproxy import round_robin
from tests.support.node import Node
from tests.support.workers import run_workers

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]

COMMAND = [sys.executable, "-c", "from tests.conformance.everything_server import server; server.run('stdio')"]


@pytest.mark.slow  # each of its sessions starts a Python that imports the SDK
async def test_the_2025_11_25_suite_passes_before_a_program_on_two_replicas_in_turn(
    node: Node, migrated: str, tmp_path: Path
) -> None:
    options = {"stdio": {"command": COMMAND, "retry": RETRY_INTERVAL}, "loopback": True}
    async with run_workers("stdio_app", migrated, 2, options=options) as workers, round_robin(workers.urls) as proxy:
        checks = await run_suite(node, "2025-11-25", proxy.url, tmp_path)
        # Not the one of 84 that has a tool end its response: a program on stdio has no means to ask for that.
        assert_passed(checks, scenarios=33, passed=83)
        one, other = await proxy.served()
        assert abs(one - other) <= 1
