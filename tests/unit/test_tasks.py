"""A task that drops its cancellation ends all the same."""

from __future__ import annotations

import asyncio

import pytest

from mcp_pg_events import tasks

pytestmark = pytest.mark.anyio


async def test_a_task_that_drops_a_cancellation_is_cancelled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN", 0.01)
    dropped = 0

    async def work() -> None:
        nonlocal dropped
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                if dropped == 3:
                    raise
                dropped += 1

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await asyncio.wait_for(tasks.end(None, task), 10)
    assert task.cancelled()
    assert dropped == 3


async def test_how_a_task_ended_is_nobodys_concern() -> None:
    async def fail() -> None:
        raise RuntimeError

    task = asyncio.create_task(fail())
    await tasks.end(task)
    await tasks.end(task)
    assert task.done()


@pytest.mark.parametrize("together", [False, True])
async def test_who_ends_a_task_may_be_cancelled(together: bool) -> None:
    task = asyncio.create_task(asyncio.sleep(60))
    ending = asyncio.create_task(tasks.end(task))
    if not together:
        await asyncio.sleep(0)
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    task.cancel()
