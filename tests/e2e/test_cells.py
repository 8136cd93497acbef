"""One server on two databases, behind the balancer of docs/explanation/scaling.md."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.support.calls import Counting
from tests.support.haproxy import configured, round_robin
from tests.support.log import query
from tests.support.mcp_http import Session, close_all
from tests.support.postgres import create_database, database_name, drop_database, free_port
from tests.support.workers import run_workers

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs/explanation/scaling.md"
FRONTEND = """
defaults
    timeout client 5m
frontend mcp
    mode http
    option http-no-delay
    bind 127.0.0.1:{port}
    default_backend cells
"""


@pytest.fixture
def databases(postgres_dsn: str, migrated_template: str) -> Iterator[list[str]]:
    made = [create_database(postgres_dsn, template=database_name(migrated_template)) for _ in range(2)]
    yield made
    for dsn in made:
        drop_database(postgres_dsn, dsn)


@contextlib.asynccontextmanager
async def cells(databases: list[str], tmp_path: Path) -> AsyncIterator[str]:
    """The URL of two cells of two workers each."""
    async with contextlib.AsyncExitStack() as stack:
        [backend] = re.findall(r"^```text\n(backend .*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
        for name, dsn in zip("ab", databases, strict=True):
            workers = await stack.enter_async_context(run_workers("mcpserver_app", dsn, 2))
            cell = await stack.enter_async_context(round_robin(workers.urls))
            assert f"cell-{name}.example:80" in backend
            backend = backend.replace(f"cell-{name}.example:80", urlsplit(cell.url).netloc)
        port = free_port()
        await stack.enter_async_context(configured(FRONTEND.format(port=port) + backend, port, tmp_path))
        yield f"http://127.0.0.1:{port}"
        close_all()


async def test_every_session_stays_in_its_cell_and_moves_freely_within_it(databases: list[str], tmp_path: Path) -> None:
    async with cells(databases, tmp_path) as url:
        sessions = [await Session.initialize(url) for _ in range(8)]
        calls = [await Counting.start(session, n=40, seconds=2) for session in sessions]
        for call in calls:
            await call.resumed(await call.session.get(call.cut()))
        for call in calls:
            await call.finished()
        for session in sessions:
            assert await session.call_result("echo", {"text": "on"}) == "on"
        count = "SELECT count(*) FROM sessions"
        assert [await asyncio.to_thread(query, dsn, count) for dsn in databases] == [[(4,)], [(4,)]]
