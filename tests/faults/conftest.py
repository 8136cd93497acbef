"""The worker processes of `tests/e2e`, for tests that hurt them, and PostgreSQL servers and upstreams that obey."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from tests.e2e.conftest import running_workers, shared_workers, start_workers
from tests.support.mcp_http import close_all
from tests.support.scripted_proxy import replica_once, scripted_once, session, upstream
from tests.support.servers import Cluster, Server, migrated_cluster
from tests.support.workers import Workers, run_workers

__all__ = [
    "replica_once",
    "running_workers",
    "scripted_once",
    "session",
    "shared_workers",
    "start_workers",
    "upstream",
]

StartServer = Callable[..., Awaitable[Server]]
WorkersOn = Callable[..., Awaitable[Workers]]


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A migrated cluster, to copy."""
    with migrated_cluster() as made:
        yield made


@pytest.fixture
async def start_server(cluster: Cluster, anyio_backend: str) -> AsyncIterator[StartServer]:
    """`await start_server(max_connections=20)`: a PostgreSQL of this test's own, with the current schema."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings: object) -> Server:
            return await stack.enter_async_context(Server.copy_of(cluster, **settings))

        yield start


@pytest.fixture
async def workers_on(start_server: StartServer) -> AsyncIterator[WorkersOn]:
    """`await workers_on(server.dsn, 2, outage_timeout=3)`: processes of `mcpserver_app`, with options of `durable`."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(dsn: str, count: int = 2, *, app: str = "mcpserver_app", **durable: object) -> Workers:
            # The calls that a test leaves behind do not hold it up.
            options = {"durable": {"drain_timeout": 1, **durable}}
            return await stack.enter_async_context(run_workers(app, dsn, count, options=options))

        yield start
        close_all()
