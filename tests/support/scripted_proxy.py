"""A replica of the HTTP proxy before a scripted upstream, one for a test module, and what its client gets.

`tests/faults/conftest.py` has the fixtures: `session` at the replica, and its `upstream`, new for each test.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.mcp_http import Response, Session, close_all
from tests.support.scripted_answers import sending
from tests.support.scripted_upstream import ScriptedUpstream
from tests.support.workers import Workers, run_workers

LIMIT = 1_000_000
"""Bytes that a message may have."""

PATIENCE = 1.5
"""Seconds that the replica waits for its upstream."""

LOST = {"reason": "upstream_lost"}


@pytest.fixture(scope="module")
async def scripted_once(anyio_backend: str) -> AsyncIterator[ScriptedUpstream]:
    async with ScriptedUpstream.running() as upstream:
        yield upstream


@pytest.fixture
async def upstream(scripted_once: ScriptedUpstream) -> AsyncIterator[ScriptedUpstream]:
    """The one of the module, which has forgotten what other tests did with it."""
    yield scripted_once
    close_all()
    scripted_once.forget()


@pytest.fixture(scope="module")
async def replica_once(scripted_once: ScriptedUpstream, migrated_once: str) -> AsyncIterator[Workers]:
    environment = {"TEST_UPSTREAM": scripted_once.url}
    options = {"proxy": {"patience": PATIENCE, "upstream_timeout": PATIENCE, "max_message_size": LIMIT}}
    async with run_workers("proxied_app", migrated_once, 1, environment=environment, options=options) as workers:
        yield workers


@pytest.fixture
async def session(replica_once: Workers, upstream: ScriptedUpstream) -> AsyncIterator[Session]:
    """One at the replica, which has not complained when the test is over."""
    replica_once.forget()
    yield await Session.initialize(replica_once[0].url)
    close_all()
    output = replica_once[0].output()
    assert "Traceback" not in output and "ERROR" not in output, output


async def messages(response: Response) -> list[Any]:
    assert response.status == 200, (response.status, await response.read())
    async with asyncio.timeout(15):
        return await response.messages()


async def progress_of(response: Response) -> tuple[list[int], Any]:
    """The numbers of the notes that came, and the answer."""
    *notes, final = await messages(response)
    return [each["params"]["progress"] for each in notes], final


async def assert_free(session: Session, upstream: ScriptedUpstream, request_id: Any) -> None:
    """The id of a call that is over may be used again."""
    upstream.on_call = [sending()]
    assert "result" in (await messages(await session.call("echo", id=request_id)))[-1]
