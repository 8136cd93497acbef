"""Ids of messages, on their way between a session's dispatcher and the wire.

Ids of requests to the client get the worker's number and that of the session's object on their way out, and lose them
on their way in. They do not parse as integers: the SDK coerces ids with `int()`. Next: `session.py`.
"""

from __future__ import annotations

import hashlib
import re
from typing import Final

from mcp.shared.dispatcher import coerce_request_id
from mcp_types import (
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCNotification,
    JSONRPCRequest,
    JSONRPCResponse,
    RequestId,
)

__all__ = ["incoming", "outgoing", "parse_wire_id", "request_key"]

_WIRE_ID: Final = re.compile(r"w([0-9]{1,18})\.([0-9]{1,18})\.(.*)", re.ASCII | re.DOTALL)


def request_key(request_id: RequestId) -> str:
    """The key under which two ids are one: the SDK takes `"12"`, 12 and `"1_2"` for the same request."""
    coerced = coerce_request_id(request_id)
    if isinstance(coerced, int) and coerced.bit_length() < 500:
        return f"i{coerced}"
    # Of bounded length and without U+0000, whatever the client's id is like.
    return "s" + hashlib.sha256(str(coerced).encode("utf-8", "surrogatepass")).hexdigest()


def parse_wire_id(request_id: RequestId | None) -> tuple[int, int, str] | None:
    """Worker, session object and id of a request that a server sent; None when it is none of ours."""
    match = _WIRE_ID.fullmatch(request_id) if isinstance(request_id, str) else None
    return (int(match[1]), int(match[2]), match[3]) if match else None


def incoming(message: JSONRPCMessage) -> JSONRPCMessage:
    """The message with the ids that this worker's dispatcher gave."""
    match message:
        case JSONRPCResponse() | JSONRPCError():
            if (named := parse_wire_id(message.id)) is not None:
                return message.model_copy(update={"id": named[2]})
        case JSONRPCNotification(method="notifications/progress", params=dict() as params):
            if (named := parse_wire_id(params.get("progressToken"))) is not None:
                return message.model_copy(update={"params": params | {"progressToken": named[2]}})
    return message


def outgoing(
    message: JSONRPCRequest | JSONRPCNotification, worker: int, incarnation: int
) -> JSONRPCRequest | JSONRPCNotification:
    """The message with the worker and the session object in its ids."""
    params = message.params
    match message:
        case JSONRPCRequest():
            wire_id = _wire_id(message.id, worker, incarnation)
            if params and isinstance(meta := params.get("_meta"), dict) and meta.get("progressToken") == message.id:
                params = params | {"_meta": meta | {"progressToken": wire_id}}
                return message.model_copy(update={"id": wire_id, "params": params})
            return message.model_copy(update={"id": wire_id})
        case JSONRPCNotification(method="notifications/cancelled", params=dict() as named):
            if isinstance(request_id := named.get("requestId"), int | str):
                update = {"params": named | {"requestId": _wire_id(request_id, worker, incarnation)}}
                return message.model_copy(update=update)
    return message


def _wire_id(request_id: RequestId, worker: int, incarnation: int) -> str:
    return f"w{worker}.{incarnation}.{request_id}"
