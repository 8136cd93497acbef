"""The upstream of an HTTP proxy: one request of it, and what may go there and come back.

Nothing is followed (a redirect could take a credential elsewhere), nothing is sent twice. Next: the network.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp
from starlette.requests import Request
from yarl import URL

from ..errors import ConfigurationError
from ..responses import SESSION_ID

__all__ = ["EVENT_STREAM", "Reply", "Upstream", "UpstreamFailed", "forwarded_headers", "returned_headers"]

EVENT_STREAM: Final = "text/event-stream"
CONNECT_TIMEOUT: Final = 10.0
KEEP_ALIVE: Final = 3.0
"""How long (seconds) an unused connection is kept: less than the 5 s after which uvicorn and Node close theirs."""
DEAD_AFTER: Final = 30
"""After how many seconds a host is taken for dead that acknowledges nothing, or takes no more of a large request."""
READ: Final = 256 * 1024
FINISH: Final = 0.5
"""How long (seconds) the end of an answer may take that is of no more interest."""

_HOP_BY_HOP: Final = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    "upgrade".split()
)
"""RFC 9110, 7.6.1: of one connection, and not of the message."""
_OURS: Final = frozenset(("host", "content-length", "accept-encoding", "expect", SESSION_ID, "last-event-id"))
"""What is said anew: this proxy's connection, and the session and the events as the upstream knows them."""
_RETURNED: Final = frozenset(("content-length", "date", "server", SESSION_ID))


class UpstreamFailed(Exception):
    """The upstream gave no answer that could be passed on. The text says why, without anything of the request's."""

    def __init__(self, reason: str, status: int = 502) -> None:
        super().__init__(reason)
        self.status = status


def forwarded_headers(request: Request) -> dict[str, str]:
    """The headers of a client's request that go to the upstream, and where the request came from (`X-Forwarded-*`)."""
    connection = {name.strip().lower() for name in request.headers.get("connection", "").split(",")}
    headers: dict[str, str] = {}
    for name, value in request.headers.items():
        if name not in _HOP_BY_HOP and name not in _OURS and name not in connection:
            # A name that comes twice is a list (RFC 9110, 5.3); cookies are divided otherwise.
            headers[name] = (
                value if name not in headers else headers[name] + ("; " if name == "cookie" else ", ") + value
            )
    client = request.client.host if request.client else "unknown"
    before = headers.get("x-forwarded-for")
    # The ASGI server may have taken the client from there, where it trusts the one who said so.
    if before is None or before.rpartition(",")[2].strip() != client:
        headers["x-forwarded-for"] = client if before is None else f"{before}, {client}"
    headers.setdefault("x-forwarded-proto", request.url.scheme)
    if (host := request.headers.get("host")) is not None:
        headers.setdefault("x-forwarded-host", host)
    return headers


def returned_headers(reply: Reply) -> list[tuple[bytes, bytes]]:
    """The headers of the upstream's answer that go to the client, each as often as it came."""
    named = (value for name, value in reply.headers if name.lower() == "connection")
    dropped = _HOP_BY_HOP | _RETURNED | {name.strip().lower() for value in named for name in value.split(",")}
    return [
        (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
        for name, value in reply.headers
        if name.lower() not in dropped
    ]


@dataclass(frozen=True, slots=True)
class Reply:
    """The head of an answer, and its body as it comes."""

    status: int
    headers: tuple[tuple[str, str], ...]
    _response: aiohttp.ClientResponse
    _limit: int

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name), None)

    @property
    def media_type(self) -> str:
        return (self.header("content-type") or "").partition(";")[0].strip().lower()

    @property
    def is_stream(self) -> bool:
        """Whether it is a stream of events."""
        return self.status == 200 and self.media_type == EVENT_STREAM

    @property
    def is_encoded(self) -> bool:
        """Whether it is compressed, which it was asked not to be."""
        return (self.header("content-encoding") or "identity").strip().lower() != "identity"

    def refuse_redirect(self) -> None:
        """Raise `UpstreamFailed` where it sends its reader elsewhere: nothing is followed, by the client neither."""
        if 300 <= self.status < 400:
            self.close()
            raise UpstreamFailed("The upstream redirects to another URL; the proxy has to be given that one")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, as it arrives. Raises `UpstreamFailed` where it is cut."""
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise UpstreamFailed(f"The upstream's answer was cut ({_why(error)})") from None

    async def body(self, timeout: float) -> bytes:
        """The whole body. Raises `UpstreamFailed` where it is cut, larger than a message may be, or too slow."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(timeout):
                async for chunk in self.chunks():
                    size += len(chunk)
                    if size > self._limit:
                        raise UpstreamFailed("The upstream's answer is larger than a message may be")
                    parts.append(chunk)
        except TimeoutError:
            raise UpstreamFailed(f"The upstream's answer did not end within {timeout:g} seconds", 504) from None
        finally:
            self.close()
        return b"".join(parts)

    async def finish(self) -> None:
        """Read what is left of it, if that is little and comes at once: its connection then serves other requests."""
        size = 0
        try:
            async with asyncio.timeout(FINISH):
                async for chunk in self.chunks():
                    size += len(chunk)
                    if size > READ:
                        break
        except (TimeoutError, UpstreamFailed):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Read no more of it. A body that was read to its end leaves its connection for others."""
        self._response.release() if self._response.content.at_eof() else self._response.close()


class Upstream:
    """The endpoint at `url`, within `async with`."""

    def __init__(self, url: str, *, verify: bool, ca_file: str | None, timeout: float, max_message_size: int) -> None:
        """
        Raises:
            ConfigurationError: the URL is none of an HTTP endpoint, or the file has no certificates.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment:
            raise ConfigurationError(
                "The upstream's URL is that of its MCP endpoint, such as http://127.0.0.1:3000/mcp"
            )
        if parts.username is not None or parts.password is not None:
            raise ConfigurationError("The upstream's URL contains a user; credentials come from the clients alone")
        self.host = parts.hostname if port is None else f"{parts.hostname}:{port}"
        self.url = url
        self._ssl: ssl.SSLContext | bool = True
        if parts.scheme == "https":
            self._ssl = _context(verify, ca_file)
        self.timeout = timeout
        self._limit = max_message_size
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        connector = aiohttp.TCPConnector(
            limit=0, ssl=self._ssl, keepalive_timeout=KEEP_ALIVE, socket_factory=_watched_socket
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ,
            skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(
        self,
        method: str,
        headers: Mapping[str, str],
        *,
        query: bytes = b"",
        body: Any = None,
        session_id: str | None = None,
        extra: Iterable[tuple[str, str]] = (),
        timeout: float | None = None,
    ) -> Reply:
        """Send a request, once; the answer when its head is there. `headers` are what `forwarded_headers` gave.

        Raises:
            UpstreamFailed: it cannot be reached, gave no answer within `timeout` seconds, or no HTTP.
        """
        assert self._session is not None
        sent = {**headers, "accept-encoding": "identity", **dict(extra)}
        if session_id is not None:
            sent[SESSION_ID] = session_id
        timeout = self.timeout if timeout is None else timeout
        url = self.url
        if query:
            url += ("&" if "?" in url else "?") + query.decode("latin-1")
        waiting = asyncio.timeout(timeout)
        try:
            async with waiting:
                response = await self._session.request(
                    method, URL(url, encoded=True), headers=sent, data=body, allow_redirects=False
                )
        except aiohttp.ConnectionTimeoutError:
            raise UpstreamFailed(
                f"The upstream cannot be reached (no answer within {CONNECT_TIMEOUT:g} seconds)", 503
            ) from None
        except aiohttp.ClientConnectorCertificateError:
            raise UpstreamFailed("The upstream's certificate cannot be verified") from None
        except aiohttp.ClientConnectorDNSError:
            raise UpstreamFailed("The upstream's name cannot be resolved", 503) from None
        except aiohttp.ClientConnectorError as error:
            raise UpstreamFailed(f"The upstream cannot be reached ({_why(error.os_error)})", 503) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if waiting.expired():
                raise UpstreamFailed(f"The upstream gave no answer within {timeout:g} seconds", 504) from None
            if isinstance(error, OSError) and error.errno == errno.ETIMEDOUT:
                raise UpstreamFailed(f"The upstream's host took nothing for {DEAD_AFTER} seconds", 504) from None
            raise UpstreamFailed(f"The upstream gave no answer ({_why(error)})") from None
        items = tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in response.raw_headers)
        return Reply(response.status, items, response, self._limit)


def _watched_socket(address: aiohttp.AddrInfoType) -> socket.socket:
    """A socket whose reads fail when the other host is gone without a word; a stream may be silent for hours."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", DEAD_AFTER // 2),
        ("TCP_KEEPINTVL", DEAD_AFTER // 6),
        ("TCP_KEEPCNT", 3),
        # What is not acknowledged is sent again for a quarter of an hour otherwise, without probes (tcp(7)).
        ("TCP_USER_TIMEOUT", DEAD_AFTER * 1000),
    ):
        # As far as the system has them.
        if (number := getattr(socket, option, None)) is not None:
            made.setsockopt(socket.IPPROTO_TCP, number, value)
    return made


def _why(error: BaseException) -> str:
    """An error in words that tell nothing of the request."""
    if isinstance(error, ssl.SSLError):
        return f"no TLS: {error.reason.lower().replace('_', ' ')}" if error.reason else "no TLS"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    match error:
        case aiohttp.ServerDisconnectedError():
            return "it closed the connection"
        case aiohttp.ClientPayloadError():
            return "its body is not whole"
        case aiohttp.ClientResponseError():
            return "what it sent is not HTTP"
    return type(error).__name__


def _context(verify: bool, ca_file: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or "no certificates"
        raise ConfigurationError(f"The file of certificates {ca_file!r} cannot be used ({reason})") from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
