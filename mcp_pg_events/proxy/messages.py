"""What programs and upstreams write, as messages: they go on as they are where that is possible."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pydantic_core
from mcp_types import (
    INTERNAL_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    JSONRPCResponse,
    RequestId,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError

from ..ids import request_key
from ..session import REQUEST_CANCELLED

__all__ = ["CANCELLED", "Written", "answer", "error_of", "message_in", "one_line", "read_line"]

_UNENCODABLE = "The server's answer is no JSON-RPC message that could be passed on"


CANCELLED: Final = {"code": REQUEST_CANCELLED, "message": "Request cancelled"}


@dataclass(frozen=True, slots=True)
class Written:
    """A message, and its one serialisation: from here to the wire it is bytes."""

    message: JSONRPCMessage
    payload: bytes


def read_line(line: bytes) -> Written | None:
    """The message in a line of a program's output; None where there is none.

    An answer that JSON cannot carry (a lone surrogate, NaN) or that is malformed becomes an error under its id, so that
    nobody waits for it in vain.
    """
    line = line.strip()
    try:
        raw = pydantic_core.from_json(line, allow_inf_nan=False)
        message = jsonrpc_message_adapter.validate_python(raw, by_name=False)
    except (ValueError, ValidationError):
        request_id = _id_of_answer(line)
        return None if request_id is None else error(request_id, INTERNAL_ERROR, _UNENCODABLE)
    return Written(message, one_line(line))


def one_line(message: bytes) -> bytes:
    """The same JSON without line breaks: a string has none, so those that are there stand between its tokens."""
    return message.replace(b"\r", b" ").replace(b"\n", b" ")


def message_in(data: bytes, wanted: str | None) -> tuple[bytes, bool] | None:
    """The message in an event of an upstream, as one line of UTF-8, and whether it answers the request with the key
    `wanted`; None where it is no message."""
    try:
        raw: Any = pydantic_core.from_json(data)
    except ValueError:
        # Not UTF-8, perhaps, which is U+FFFD then (HTML standard, 9.2.6); or half a surrogate pair, that the parser
        # refuses and JavaScript writes, for a string that was cut in two.
        data = data.decode("utf-8", "replace").encode()
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError):
            return None
    if not isinstance(raw, dict):
        return None
    final = False
    if wanted is not None and "method" not in raw and ("result" in raw or "error" in raw):
        answered = raw.get("id")
        final = isinstance(answered, str | int) and not isinstance(answered, bool) and request_key(answered) == wanted
    return one_line(data), final


def error_of(request_id: RequestId, error: Mapping[str, Any]) -> bytes:
    """The error that ends a call."""
    return json.dumps({"jsonrpc": "2.0", "id": request_id, "error": error}).encode()


def error(request_id: RequestId, code: int, text: str, reason: str | None = None) -> Written:
    """An error as the answer to a request."""
    data = (
        ErrorData(code=code, message=text)
        if reason is None
        else ErrorData(code=code, message=text, data={"reason": reason})
    )
    return _written(JSONRPCError(jsonrpc="2.0", id=request_id, error=data))


def answer(written: Written, request_id: RequestId) -> Written:
    """An answer under the id that its client gave; programs may take `"7"` for 7."""
    message = written.message
    assert isinstance(message, JSONRPCResponse | JSONRPCError)
    if type(message.id) is type(request_id) and message.id == request_id:
        return written
    return _written(message.model_copy(update={"id": request_id}))


def _written(message: JSONRPCMessage) -> Written:
    return Written(message, message.model_dump_json(by_alias=True, exclude_unset=True).encode())


def _id_of_answer(line: bytes) -> RequestId | None:
    try:
        raw: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(raw, dict) or "method" in raw or not ("result" in raw or "error" in raw):
        return None
    request_id = raw.get("id")
    return request_id if isinstance(request_id, str | int) and not isinstance(request_id, bool) else None
