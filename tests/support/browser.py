"""Headless Chromium with a page on an origin of its own, which uses the TypeScript SDK's client.

async with Page.opened(node, endpoint) as page:
    page.origin
    await page.told("half way")     # what the page said, as a dictionary
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.support.node import Node, bundle
from tests.support.postgres import die_with_parent
from tests.support.tools import missing_tool

SCRIPT = Path(__file__).parents[1] / "conformance" / "browser_page.mjs"
HTML = b"<!doctype html><meta charset=utf-8><title>A client</title><script type=module src=/page.js></script>"


class Page:
    """The page's own server, and what the page told it."""

    def __init__(self, script: bytes) -> None:
        self._script = script
        self._told: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.origin = ""

    @classmethod
    @contextlib.asynccontextmanager
    async def served(cls, node: Node) -> AsyncIterator[Page]:
        """Serve it; nobody looks at it yet."""
        page = cls(await asyncio.to_thread(bundle, node, SCRIPT))
        server = await asyncio.start_server(page._serve, "127.0.0.1", 0)
        page.origin = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield page

    @contextlib.asynccontextmanager
    async def opened(self, endpoint: str) -> AsyncIterator[None]:
        """Have Chromium open it, and use the MCP endpoint."""
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if chromium is None:
            missing_tool("Chromium", "install Debian's package chromium.")
        with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
            process = await asyncio.create_subprocess_exec(
                *(chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
                *("--no-first-run", f"--user-data-dir={profile}", "--remote-debugging-port=0"),
                f"{self.origin}/?endpoint={quote(endpoint, safe='')}",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                preexec_fn=die_with_parent(9),
            )
            try:
                yield
            finally:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
                await process.wait()

    async def told(self, *events: str, timeout: float = 30.0) -> dict[str, Any]:
        """The next of these events that the page tells of."""
        async with asyncio.timeout(timeout):
            while True:
                told = await self._told.get()
                if told["event"] in events:
                    return told

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            first, *lines = head.rstrip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            method, target, _ = first.split(" ")
            kind, content = "text/html", HTML
            if target == "/page.js":
                kind, content = "text/javascript", self._script
            elif method == "POST":
                self._told.put_nowait(json.loads(body))
                content = b""
            writer.write(
                f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n"
                "connection: close\r\n\r\n".encode()
                + content
            )
            await writer.drain()
        writer.close()
