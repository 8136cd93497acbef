"""The errors that end calls which cannot end by themselves.

Next: whoever writes finals in the place of a call's worker (`finish.py`, `retention.py`).
"""

from __future__ import annotations

from typing import Any, Final

from mcp_types import CONNECTION_CLOSED

__all__ = ["MESSAGES", "final_error"]

MESSAGES: Final = {
    "worker_lost": "The worker running this request is gone",
    "session_ended": "The session ended before this request completed",
    "shutdown": "The server shut down before this request completed",
    "not_stored": "A message of this request could not be stored",
    "data_lost": "The server's database lost a part of this response",
    "outage": "The server lost its database before this request completed",
    "upstream_lost": "The upstream's response to this request is lost",
    "process_lost": "The server's process ended before this request completed",
}


def final_error(reason: str) -> dict[str, Any]:
    """The JSON-RPC error object of a call that ends without its result: code -32000, and `reason` in its data."""
    return {"code": CONNECTION_CLOSED, "message": MESSAGES[reason], "data": {"reason": reason}}
