"""An ASGI app behind a real uvicorn in this process, for tests of how an app is put together.

async with serving(app) as url: ...
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn

from tests.support.mcp_http import close_all


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the test run's own handlers where they are."""
        yield


@contextlib.asynccontextmanager
async def serving(app: Any, **options: Any) -> AsyncIterator[str]:
    """The base URL of `app` on a free port of the loopback interface; `options` are uvicorn's.

    Raises:
        RuntimeError: the app's lifespan failed.
    """
    config = uvicorn.Config(
        app, **{"host": "127.0.0.1", "port": 0, "log_config": None, "timeout_graceful_shutdown": 3, **options}
    )
    server = _Server(config)
    started = asyncio.create_task(_serve(server))
    while not server.started:
        if started.done():
            raise RuntimeError("The app did not start") from started.exception()
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        close_all()
        server.should_exit = True
        await started


async def _serve(server: uvicorn.Server) -> None:
    try:
        await server.serve()
    except SystemExit as exit:
        # How uvicorn says that the lifespan's startup failed; in a task it would end the test run.
        raise RuntimeError(f"uvicorn exited with {exit.code}") from None
