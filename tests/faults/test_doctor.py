"""`mcp-pg-events doctor` behind a pooler, and on a standby."""

from __future__ import annotations

import asyncio

import pytest

from mcp_pg_events import doctor
from mcp_pg_events.doctor import Check
from tests.faults.conftest import StartServer
from tests.support.pgbouncer import PgBouncer

pytestmark = pytest.mark.anyio


async def examine(dsn: str, listen_dsn: str | None = None) -> dict[str, Check]:
    made = await asyncio.to_thread(doctor.examine, dsn, schema="mcp_events", listen_dsn=listen_dsn)
    return {check.name: check for check in made}


async def test_a_pooler_in_transaction_mode_is_named_and_a_direct_listen_dsn_cures_it(
    start_server: StartServer,
) -> None:
    server = await start_server()
    async with PgBouncer.before(server) as bouncer:
        found = await examine(bouncer.dsn)
        assert (found["pooler"].status, found["listen"].status) == ("warn", "fail")
        assert "listen_dsn" in (found["pooler"].advice or "")
        found = await examine(bouncer.dsn, server.dsn)
        assert (found["pooler"].status, found["listen"].status) == ("warn", "ok")
        assert {check.status for check in found.values()} == {"ok", "warn"}


async def test_a_standby_is_named(start_server: StartServer) -> None:
    primary = await start_server()
    async with primary.standby() as standby:
        found = await examine(standby.dsn)
        assert found["connection"].status == "fail"
        assert "it is a standby" in found["connection"].found
