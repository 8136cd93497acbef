"""Upgrading without an outage: workers of the oldest revision that is still served, and of this one, side by side.

The old ones run the code of that time, out of this repository's history, under a role with the least privileges. The
schema is migrated while they serve.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mcp_pg_events import migrate
from mcp_pg_events.schema import REVISION
from tests.support.calls import Counting, flow
from tests.support.command import without_settings
from tests.support.history import checkout_of
from tests.support.log import assert_no_deadlocks, assert_streams_are_whole, query
from tests.support.mcp_http import Session, close_all
from tests.support.roles import login_role
from tests.support.until import until
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio

OLDEST = "0001"
"""`settings.oldest_worker` of a migrated database: a test compares."""

EXPECTED = (r"is gone \(", r"is gone;", "shut down", "did not finish within", "The listening connection was lost")
"""What the workers may say of those that the tests end."""


@pytest.fixture(scope="module")
def old() -> Iterator[Path]:
    """A checkout of the oldest code that the schema still serves."""
    with checkout_of(OLDEST) as root:
        yield root


def migrate_as_of(root: Path, dsn: str, role: str) -> None:
    """Run the `migrate` of that checkout."""
    subprocess.run(
        [sys.executable, "-m", "mcp_pg_events", "migrate", "--dsn", dsn, "--worker-role", role],
        cwd=root,
        env=without_settings(PYTHONPATH=str(root)),
        check=True,
        capture_output=True,
        timeout=60,
    )


@pytest.fixture
def as_of_old(database: str, old: Path) -> Iterator[tuple[str, str]]:
    """The DSN of a database that the old code has migrated, and a role for workers."""
    with login_role(database) as (role, dsn):
        migrate_as_of(old, database, role)
        yield dsn, role


@contextlib.asynccontextmanager
async def old_worker(root: Path, dsn: str) -> AsyncIterator[Workers]:
    """Workers of which the first runs the old code."""
    async with run_workers("mcpserver_app", dsn, 0, options={"durable": {"drain_timeout": 10}}) as workers:
        await workers.add(root=root)
        yield workers
        close_all()


async def upgraded(workers: Workers, database: str, role: str) -> None:
    """Migrate to the present while the old worker serves, and start one of the present code beside it."""
    await asyncio.to_thread(migrate.upgrade, database, worker_role=role)
    await workers.add()
    revisions = query(database, "SELECT revision FROM workers WHERE ended_at IS NULL ORDER BY number")
    assert revisions == [(OLDEST,), (REVISION,)]


def assert_sound(workers: Workers, database: str) -> None:
    workers.assert_clean_logs(*EXPECTED)
    assert_streams_are_whole(database)
    assert_no_deadlocks(database)


def test_the_oldest_worker_that_is_served_is_the_one_that_is_tested(migrated: str) -> None:
    assert query(migrated, "SELECT oldest_worker FROM settings") == [(OLDEST,)]


async def test_the_migration_runs_while_an_old_worker_serves(
    database: str, as_of_old: tuple[str, str], old: Path
) -> None:
    dsn, role = as_of_old
    async with old_worker(old, dsn) as workers:
        url = workers[0].url
        session = await Session.initialize(url)
        standalone = await session.get()
        counting = await Counting.start(session, n=150, seconds=3)
        migrated = asyncio.create_task(asyncio.to_thread(migrate.upgrade, database, worker_role=role))
        slowest = 0.0
        clock = asyncio.get_running_loop().time
        calls = 0
        while not migrated.done() or calls < 20:
            began = clock()
            assert await session.call_result("echo", {"text": "on"}) == "on"
            assert await (await Session.initialize(url)).call_result("echo", {"text": "new"}) == "new"
            slowest, calls = max(slowest, clock() - began), calls + 1
        await migrated
        assert slowest < 3, f"A call waited {slowest:.1f} s for the migration."
        await counting.finished()
        assert (await session.delete()).status == 200
        assert await standalone.drain()
        assert_sound(workers, database)


async def test_all_that_a_session_does_goes_on_across_old_and_new_workers(
    database: str, as_of_old: tuple[str, str], old: Path
) -> None:
    """Sessions opened on either, their calls resumed on the other, their questions answered and calls cancelled there,
    and their end told there."""
    dsn, role = as_of_old
    async with old_worker(old, dsn) as workers:
        before = await Session.initialize(workers[0].url)
        await upgraded(workers, database, role)
        first, second = workers.members
        # Long enough for each to judge whether the other is alive.
        long = [await Counting.start(before, n=8, seconds=8, base_url=worker.url) for worker in workers.members]
        # One that was there before the migration is served by the new code.
        assert await before.call_result("echo", {"text": "moved"}, base_url=second.url) == "moved"
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(flow(workers, first, second))
                group.create_task(flow(workers, second, first))
            for call in long:
                group.create_task(call.finished())
        assert query(database, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(2,)]
        assert_sound(workers, database)


@pytest.mark.parametrize("leaving", [0, 1], ids=["old", "new"])
async def test_one_drains_and_its_clients_go_on_at_the_other(
    database: str, as_of_old: tuple[str, str], old: Path, leaving: int
) -> None:
    dsn, role = as_of_old
    async with old_worker(old, dsn) as workers:
        await upgraded(workers, database, role)
        goes, stays = workers[leaving], workers[1 - leaving]
        session = await Session.initialize(goes.url)
        counting = await Counting.start(session, n=40, seconds=2)
        goes.signal(signal.SIGTERM)
        await counting.ended()
        await counting.resumed(await session.get(counting.cursor, base_url=stays.url))
        await counting.finished()
        assert await session.call_result("echo", {"text": "on"}, base_url=stays.url) == "on"
        assert await asyncio.wait_for(goes.process.wait(), 15) in (0, -signal.SIGTERM)
        assert_sound(workers, database)


@pytest.mark.parametrize("dying", [0, 1], ids=["old", "new"])
async def test_one_dies_and_the_other_ends_its_calls(
    database: str, as_of_old: tuple[str, str], old: Path, dying: int
) -> None:
    dsn, role = as_of_old
    async with old_worker(old, dsn) as workers:
        await upgraded(workers, database, role)
        dead, alive = workers[dying], workers[1 - dying]
        session = await Session.initialize(dead.url)
        counting = await Counting.start(session, n=1000, seconds=60)
        await dead.kill()
        cursor = counting.cut()

        async def ended() -> bool:
            statement = "SELECT number FROM workers WHERE ended_reason = 'worker_lost'"
            return bool(await asyncio.to_thread(query, database, statement))

        await until(ended, timeout=20)
        messages = await (await session.get(cursor, base_url=alive.url)).messages()
        assert messages[-1]["error"]["data"] == {"reason": "worker_lost"}
        assert await session.call_result("echo", {"text": "on"}, base_url=alive.url) == "on"
        assert_sound(workers, database)


def test_a_history_that_is_cut_short_fails_in_one_sentence(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True, timeout=30)
    with pytest.raises(pytest.fail.Exception) as failure, checkout_of(OLDEST, repository=tmp_path):
        pass
    assert "git fetch --unshallow" in str(failure.value)
    assert not failure.value.pytrace
