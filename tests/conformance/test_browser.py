"""A page in a browser uses the HTTP proxy from another origin, and survives a connection that is cut: it comes back to
another replica."""

from __future__ import annotations

import pytest

from tests.support.browser import Page
from tests.support.node import Node
from tests.support.tcp_proxy import TcpProxy
from tests.support.workers import run_workers

# The first test of a machine has npm download its packages.
pytestmark = [pytest.mark.anyio, pytest.mark.timeout(300)]


async def test_a_page_of_another_origin_survives_a_cut_connection(node: Node, migrated: str) -> None:
    async with (
        Page.served(node) as page,
        Page.served(node) as stranger,
        run_workers("mcpserver_app", None, 1) as upstream,
    ):
        environment = {"TEST_UPSTREAM": f"{upstream[0].url}/mcp"}
        options = {"proxy": {"cors_origins": [page.origin], "retry": 50}, "loopback": True}
        async with run_workers("proxied_app", migrated, 2, environment=environment, options=options) as replicas:
            async with TcpProxy.to(replicas[0].host, replicas[0].port) as cable:
                endpoint = f"http://127.0.0.1:{cable.port}/mcp"
                async with page.opened(endpoint):
                    assert await page.told("half way", "failed") == {"event": "half way"}
                    cable.lead(replicas[1].host, replicas[1].port)
                    cable.cut()
                    done = await page.told("done", "failed")
                assert done["event"] == "done", done
                assert done["received"] == list(range(40))
                assert done["text"] == "counted 40"
                assert done["session"], "a page may read the session's id of an answer"
                numbers = [int(cursor.rpartition("-")[2]) for cursor in done["cursors"]]
                assert numbers == sorted(numbers) and numbers[-1] in (40, 41)
                # Of a page that was not let in the browser keeps the answers, and never sends what needs a preflight.
                async with stranger.opened(endpoint):
                    refused = await stranger.told("done", "failed")
                assert refused["event"] == "failed" and refused["received"] == []
            replicas.assert_clean_logs()
        assert "of-the-page" not in upstream[0].output()
