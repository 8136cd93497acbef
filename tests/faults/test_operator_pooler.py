"""The operator's commands through a pooler in transaction mode, with the least privileges."""

from __future__ import annotations

import json

import pytest

from mcp_pg_events import PostgresStore
from tests.faults.conftest import StartServer
from tests.support.command import mcp_pg_events
from tests.support.log import NOTE, open_call, open_session
from tests.support.pgbouncer import PgBouncer

pytestmark = pytest.mark.anyio


async def test_they_need_no_connection_of_their_own(start_server: StartServer) -> None:
    server = await start_server()
    async with PostgresStore(server.dsn) as store:
        key, _ = await open_session(store)
        call = await open_call(store, key)
        for _ in range(3):
            await store.log.append(call, NOTE)
    async with PgBouncer.before(server) as bouncer:
        for command in (
            ["sessions", "list", "--json"],
            ["sessions", "show", key.session_id, "--json"],
            ["stats", "--json"],
            ["tail", key.session_id, "--no-follow", "--json"],
            ["export", key.session_id],
            ["sessions", "end", key.session_id, "--json"],
        ):
            ran = mcp_pg_events(*command, MCP_PG_EVENTS_DSN=bouncer.dsn)
            assert ran.code == 0, ran
            assert [json.loads(line) for line in ran.out.splitlines()]
