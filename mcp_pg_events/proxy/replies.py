"""What the upstream answered, read and passed on where it does not go through the log.

Next: the client, or `endpoint.py`.
"""

from __future__ import annotations

import asyncio

import pydantic_core
from mcp_types import INTERNAL_ERROR, RequestId
from starlette.responses import Response

from ..answers import error_response
from ..ids import request_key
from ..responses import SESSION_ID
from .event_stream import EventStream, EventTooLarge
from .messages import one_line
from .upstream import Reply, UpstreamFailed, returned_headers

__all__ = ["answer_of", "failure", "messages_until", "passed_on", "stored"]


def passed_on(reply: Reply, body: bytes, session_id: str | None = None) -> Response:
    """The upstream's answer as this proxy's."""
    response = Response(body, status_code=reply.status)
    kept = [pair for pair in response.raw_headers if pair[0] == b"content-length"]
    response.raw_headers = [*returned_headers(reply), *(kept if reply.status not in (204, 304) else [])]
    if session_id is not None and reply.status < 300:
        response.raw_headers.append((SESSION_ID.encode(), session_id.encode()))
    return response


def failure(failed: UpstreamFailed) -> Response:
    headers = {"Retry-After": "1"} if failed.status == 503 else None
    return error_response(failed.status, str(failed), INTERNAL_ERROR, data={"reason": "upstream_lost"}, headers=headers)


def stored(payload: bytes) -> bytes:
    """A JSON answer as an event: one line of UTF-8."""
    return one_line(payload.decode("utf-8", "replace").encode())


async def messages_until(reply: Reply, request_id: RequestId, limit: int, timeout: float) -> list[bytes]:
    """The messages of an answer up to the one that answers `request_id`, which is the last.

    Raises:
        UpstreamFailed: it never came.
    """
    found: list[bytes] = []
    size = 0
    try:
        if not reply.is_stream:
            found.append(await reply.body(timeout))
            if not isinstance(pydantic_core.from_json(found[0]), dict):
                raise ValueError
            return [stored(found[0])]
        events = EventStream(limit)
        async with asyncio.timeout(timeout):
            async for chunk in reply.chunks():
                size += len(chunk)
                if size > limit:
                    raise EventTooLarge
                for event in events.feed(chunk):
                    if not event.data or event.event != b"message":
                        continue
                    raw = pydantic_core.from_json(event.data)
                    if not isinstance(raw, dict):
                        raise ValueError
                    found.append(one_line(event.data))
                    if "method" not in raw and _answers(raw.get("id"), request_id):
                        return found
    except TimeoutError:
        raise UpstreamFailed(f"The upstream's answer did not come within {timeout:g} seconds", 504) from None
    except EventTooLarge:
        raise UpstreamFailed("The upstream's answer is larger than a message may be") from None
    except ValueError:
        raise UpstreamFailed("The upstream's answer is no MCP message") from None
    finally:
        reply.close()
    raise UpstreamFailed("The upstream ended its stream before it had answered")


def _answers(answered: object, request_id: RequestId) -> bool:
    """Whether an id is a request's, by the SDK's measure: `"7"` is 7."""
    return (
        isinstance(answered, str | int)
        and not isinstance(answered, bool)
        and request_key(answered) == request_key(request_id)
    )


async def answer_of(reply: Reply, request_id: RequestId, limit: int, timeout: float) -> object:
    """The message that answers a request, None where the answer is none."""
    if reply.status != 200 or reply.is_encoded or not (reply.is_stream or reply.media_type == "application/json"):
        reply.close()
        return None
    return pydantic_core.from_json((await messages_until(reply, request_id, limit, timeout))[-1])
