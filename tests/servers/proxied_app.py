"""Whatever is at TEST_UPSTREAM, behind the HTTP proxy. See `common.py` for the environment."""

from __future__ import annotations

import logging
import os

from mcp_pg_events.proxy import relays, upstream
from mcp_pg_events.proxy.http import proxy_app
from mcp_pg_events.proxy.stdio import loopback_security
from tests.servers.common import OPTIONS

logging.basicConfig(level=OPTIONS.get("log_level", "INFO"), format="%(levelname)s %(name)s %(message)s")
for name, value in OPTIONS.get("upstream", {}).items():
    setattr(upstream, name, value)
relays.LINGER = OPTIONS.get("linger", relays.LINGER)
options = dict(OPTIONS.get("proxy", {}))
if OPTIONS.get("loopback"):
    options["security"] = loopback_security()
app = proxy_app(os.environ["TEST_UPSTREAM"], os.environ["MCP_PG_EVENTS_DSN"], **options)
