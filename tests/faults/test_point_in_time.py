"""A base backup and an archive of the WAL, recovered to a point in time: docs/how-to/backup.md."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcp_pg_events.backend import CursorRejected
from tests.faults.conftest import StartServer
from tests.support.log import NOTE, open_session, running, standalone
from tests.support.servers import Cluster

pytestmark = pytest.mark.anyio


@pytest.fixture
def archive(cluster: Cluster) -> Iterator[Path]:
    """A directory that PostgreSQL may write into."""
    with tempfile.TemporaryDirectory(prefix="archive-", ignore_cleanup_errors=True) as made:
        if cluster.user is not None:
            shutil.chown(made, cluster.user)
        yield Path(made)


async def test_after_a_recovery_to_a_point_in_time_no_id_is_given_twice(
    start_server: StartServer, archive: Path
) -> None:
    server = await start_server(archive_mode="on", archive_command=f"cp %p {archive}/%f")
    async with server.base_backup() as recovered:
        async with running(server.dsn, 1) as (store,):
            key, opened = await open_session(store)
            stream = standalone(key, opened)
            assert [await store.log.append(stream, NOTE) for _ in range(3)] == [1, 2, 3]
            await server.execute("SELECT pg_create_restore_point('before the mistake')")
            lost = await store.log.append(stream, NOTE)
            _, unknown = await open_session(store)
        await server.stop("fast")  # which archives what there is
        await recovered.recover(archive, "before the mistake")
        async with running(recovered.dsn, 1) as (store,):
            held = await store.log.attach(key, stream.number, 2, patience=5)
            page = await store.log.read(held.stream, held.position, held.bound)
            assert [event.seq for event in page.events] == [3]
            with pytest.raises(CursorRejected, match="unknown"):
                await store.log.attach(key, stream.number, lost, patience=5)
            assert await store.log.append(standalone(key, opened), NOTE) > 1_000_000
            _, new = await open_session(store)
            assert new.standalone > unknown.standalone + 90_000
