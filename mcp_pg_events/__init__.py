"""MCP sessions in PostgreSQL: any worker serves any request, and a client that reconnects goes on where it stopped.

`app = durable(mcp.streamable_http_app(), "postgresql://localhost/app")` is the whole of it for a server's author.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from .health import Health, health_routes
    from .store import PostgresStore
    from .takeover import durable

__all__ = ["Health", "PostgresStore", "durable", "errors", "health_routes"]


def __getattr__(name: str) -> Any:
    # Imported when first asked for: the command line has no use for the SDK, whose import takes a second.
    modules = {"durable": "takeover", "PostgresStore": "store", "Health": "health", "health_routes": "health"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{modules[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
