"""Fixtures for tests that drive worker processes, and commands that serve."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mcp_http import close_all
from tests.support.postgres import create_database, database_name, drop_database
from tests.support.served import Served
from tests.support.workers import Workers, run_workers

StartWorkers = Callable[..., Awaitable[Workers]]


@pytest.fixture
async def start_workers(migrated: str, anyio_backend: str) -> AsyncIterator[StartWorkers]:
    """`await start_workers("mcpserver_app", 2, options={...})`: processes on a migrated database of this test."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(module: str, count: int = 2, **arguments: object) -> Workers:
            return await stack.enter_async_context(run_workers(module, migrated, count, **arguments))  # type: ignore[arg-type]

        yield start
        close_all()


SharedWorkers = Callable[[str], Awaitable[Workers]]


@pytest.fixture(scope="session")
async def running_workers(
    postgres_dsn: str, migrated_template: str, anyio_backend: str
) -> AsyncIterator[SharedWorkers]:
    """Two processes of each app, started when a test first asks for them; they stay until the run ends."""
    dsn = create_database(postgres_dsn, template=database_name(migrated_template))
    started: dict[str, Workers] = {}
    async with contextlib.AsyncExitStack() as stack:

        async def get(module: str) -> Workers:
            if module not in started or len(started[module].urls) != 2:
                started[module] = await stack.enter_async_context(run_workers(module, dsn, 2))
            return started[module]

        yield get
    drop_database(postgres_dsn, dsn)


@pytest.fixture
async def shared_workers(running_workers: SharedWorkers) -> AsyncIterator[SharedWorkers]:
    """`await shared_workers("mcpserver_app")`: two processes that other tests use too, so do not end or freeze them.

    Starting two takes some seconds: use `start_workers` only for options of its own, and for what hurts a worker.
    """
    used: list[Workers] = []

    async def get(module: str) -> Workers:
        workers = await running_workers(module)
        workers.forget()
        used.append(workers)
        return workers

    yield get
    close_all()
    for workers in used:
        workers.show()


Proxy = Callable[..., Served]


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    """`proxy("--dsn", dsn, "--", *program)`: the command in a process of its own, on a free port."""
    started: list[Served] = []

    def start(*arguments: str, **environment: str) -> Served:
        log = tmp_path / f"log-{len(started)}"
        environment["TEST_DIRECTORY"] = str(tmp_path)
        started.append(Served.start(log, "proxy", "--port", "0", *arguments, **environment))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory under a short path, which is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="mcp-pg-events-test-"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
