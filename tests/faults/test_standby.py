"""A DSN that leads to a standby: said at the start, in a sentence."""

from __future__ import annotations

import pytest

from mcp_pg_events import PostgresStore
from mcp_pg_events.errors import DatabaseUnavailable
from tests.faults.conftest import StartServer
from tests.support.log import open_session

pytestmark = pytest.mark.anyio


async def test_a_store_on_a_standby_refuses_to_start_and_starts_once_it_is_the_primary(
    start_server: StartServer, caplog: pytest.LogCaptureFixture
) -> None:
    primary = await start_server()
    async with primary.standby() as standby:
        store = PostgresStore(standby.dsn)
        with pytest.raises(DatabaseUnavailable, match="leads to a standby"):
            await store.__aenter__()
        assert "Traceback" not in caplog.text
        await primary.stop("fast")
        await standby.promote()
        async with store:
            await open_session(store)
