"""How a command says what went wrong. Used by `main`, and by a worker of `serve` that cannot start."""

from __future__ import annotations

from ..errors import Error

__all__ = ["explain"]


def explain(error: Error) -> str:
    """One sentence; and before it the notes, which are tracebacks of the user's own code."""
    return "".join(f"{note}\n" for note in getattr(error, "__notes__", ())) + f"mcp-pg-events: {error}"
