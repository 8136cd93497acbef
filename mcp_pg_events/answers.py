"""What the HTTP side answers without a stream: JSON-RPC errors for the HTTP request itself; and what it reads.

`Answer` is raised wherever a request turns out to be answered otherwise than it asked. Next: the client.
"""

from __future__ import annotations

from typing import Any, Final

import pydantic_core
from mcp_types import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    PARSE_ERROR,
    ErrorData,
    JSONRPCError,
    JSONRPCMessage,
    jsonrpc_message_adapter,
)
from pydantic import ValidationError
from starlette.responses import Response

__all__ = ["Answer", "cursor_error", "dump", "error_response", "parse"]


class Answer(Exception):
    """The request is answered with this response instead of what it asked for."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


def parse(body: bytes) -> JSONRPCMessage:
    """The JSON-RPC message of a POST. Raises `Answer`, with 400, when it is none."""
    try:
        raw = pydantic_core.from_json(body)
    except ValueError as error:
        raise Answer(error_response(400, f"Parse error: {error}", PARSE_ERROR)) from None
    if isinstance(raw, dict) and "method" in raw and "id" in raw and not _is_request_id(raw["id"]):
        # The SDK's models would take it for a notification, and nobody would ever answer.
        raise Answer(error_response(400, "Invalid request: an id is a string or an integer", INVALID_REQUEST))
    try:
        return jsonrpc_message_adapter.validate_python(raw, by_name=False)
    except ValidationError as error:
        details = "; ".join(sorted({item["msg"] for item in error.errors(include_input=False, include_url=False)}))
        raise Answer(
            error_response(400, f"Validation error: not a JSON-RPC message ({details[:300]})", INVALID_PARAMS)
        ) from None


def _is_request_id(value: object) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def dump(message: JSONRPCMessage) -> bytes:
    """A message as JSON in UTF-8."""
    return message.model_dump_json(by_alias=True, exclude_unset=True).encode()


_CURSOR_ERRORS: Final = {
    "malformed": "Last-Event-ID is malformed: it is none of the ids that this server gives",
    "unknown": "Last-Event-ID is unknown in this session",
    "expired": "Last-Event-ID has expired: events after it are no longer kept",
}


def cursor_error(reason: str) -> Response:
    """For a `Last-Event-ID` that cannot be resumed from."""
    return error_response(400, _CURSOR_ERRORS[reason], INVALID_PARAMS, data={"reason": reason})


def error_response(
    status: int, message: str, code: int = INVALID_REQUEST, *, data: Any = None, headers: dict[str, str] | None = None
) -> Response:
    """A JSON-RPC error without a request id, since it answers the HTTP request."""
    error = ErrorData(code=code, message=message) if data is None else ErrorData(code=code, message=message, data=data)
    body = dump(JSONRPCError(jsonrpc="2.0", id=None, error=error))
    return Response(body, status_code=status, media_type="application/json", headers=headers)
