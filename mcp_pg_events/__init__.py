"""MCP sessions in PostgreSQL: any worker serves any request, and a client that reconnects goes on where it stopped.

`app = durable(mcp.streamable_http_app(), "postgresql://localhost/app")` is the whole of it for a server's author.
"""

from __future__ import annotations

from . import errors
from .durable import durable
from .store import PostgresStore

__all__ = ["PostgresStore", "durable", "errors"]
