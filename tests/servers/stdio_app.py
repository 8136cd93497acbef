"""`stdio_program.py`, or the command of TEST_OPTIONS, behind the proxy. See `common.py` for the environment."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from mcp_pg_events.proxy.stdio import loopback_security, stdio_app
from tests.servers.common import OPTIONS

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
options = dict(OPTIONS.get("stdio", {}))
command = options.pop("command", [sys.executable, str(Path(__file__).with_name("stdio_program.py"))])
if header := OPTIONS.get("owner_header"):
    options["owner"] = lambda scope: dict(scope["headers"]).get(header.encode(), b"").decode()
if OPTIONS.get("loopback"):
    options["security"] = loopback_security()
app = stdio_app(command, os.environ["MCP_PG_EVENTS_DSN"], **options)
