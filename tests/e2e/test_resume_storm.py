"""The main job under load: thirty calls at once, each cut again and again, resumed on whichever worker comes."""

from __future__ import annotations

import asyncio
import os
import random
from typing import Any

import pytest

from tests.e2e.conftest import StartWorkers
from tests.support.mcp_http import Session
from tests.support.resuming import ResumingCall
from tests.support.sdk_client import sdk_session

pytestmark = pytest.mark.anyio

CALLS = 30
EVENTS = 150
SECONDS = 5.5
CUTS = 5
ARGUMENTS: dict[str, Any] = {"n": EVENTS, "seconds": SECONDS}


@pytest.fixture
def seed() -> int:
    """Printed, so that a failure can be repeated with STORM_SEED."""
    seed = int(os.environ.get("STORM_SEED") or random.SystemRandom().randrange(2**32))
    print(f"STORM_SEED={seed}")
    return seed


@pytest.mark.parametrize("module", ["mcpserver_app", "fastmcp_app"])
async def test_thirty_calls_cut_at_random_lose_and_double_nothing(
    module: str, start_workers: StartWorkers, seed: int
) -> None:
    workers = await start_workers(module, 2)
    rng = random.Random(seed)
    session = await Session.initialize(workers[0].url)
    calls = [
        ResumingCall(session, workers.urls, random.Random(rng.random()), EVENTS, arguments=ARGUMENTS, cuts=CUTS)
        for _ in range(CALLS)
    ]
    await asyncio.gather(*(call.run() for call in calls))
    for call in calls:
        call.assert_exactly_once()
        assert call.seconds >= 5.0
    assert sum(len(call.abandoned) for call in calls) >= CALLS * CUTS // 2
    workers.assert_clean_logs()


@pytest.mark.parametrize("module", ["mcpserver_app", "fastmcp_app"])
async def test_the_sdks_client_loses_nothing_when_each_request_goes_to_a_random_worker(
    module: str, start_workers: StartWorkers, seed: int
) -> None:
    # The client waits as long as `retry_interval` says before it resumes: 50 ms keep the call busy.
    workers = await start_workers(module, 2, options={"app": {"retry_interval": 50}})
    received: dict[int, list[int]] = {number: [] for number in range(CALLS)}

    async with sdk_session(workers.urls, random.Random(seed), cuts=CUTS) as (client, transport):

        async def call(number: int) -> str:
            async def on_progress(progress: float, total: float | None, message: str | None) -> None:
                received[number].append(int(message or -1))

            result = await client.call_tool("count", ARGUMENTS, progress_callback=on_progress, read_timeout_seconds=60)
            assert not result.is_error, result
            content = result.content[0]
            assert content.type == "text"
            return content.text

        results = await asyncio.gather(*(call(number) for number in range(CALLS)))

    assert results == [f"counted {EVENTS}"] * CALLS
    for number in range(CALLS):
        assert received[number] == list(range(EVENTS)), (number, received[number])
    cuts = transport.cuts_by_stream()
    assert sorted(cuts.values()) == [CUTS] * CALLS, cuts
    assert {sent.worker for sent in transport.sent} == set(workers.urls)
    workers.assert_clean_logs()
