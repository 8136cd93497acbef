"""Whom the upstream has accepted for which session.

The proxy knows no credentials of its own: what it has stored is served to a request only when the upstream has just
taken this request's credential for this session, or has within `lifetime` seconds. What is remembered of a credential
is a digest under a key that never leaves this process. Next: `endpoint.py`.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

__all__ = ["Accepted"]

REMEMBERED: Final = 100_000
"""How many credentials are remembered at most; the oldest goes first."""

_NO_CREDENTIAL: Final = frozenset(
    "accept accept-language accept-charset baggage cache-control content-type content-language dnt forwarded from "
    "mcp-protocol-version origin pragma priority range referer traceparent tracestate user-agent via "
    "x-amzn-trace-id x-client-request-id x-correlation-id x-forwarded-for x-forwarded-host x-forwarded-port "
    "x-forwarded-proto x-real-ip x-request-id".split()
)
"""Headers that say nothing of who asks. Any other may be what an upstream goes by, and is a part of the credential."""
_NO_CREDENTIAL_PREFIXES: Final = ("sec-", "if-", "mcp-method", "mcp-name")


class Accepted:
    """The credentials that the upstream took lately. Digests only."""

    def __init__(self, lifetime: float) -> None:
        self._lifetime = lifetime
        self._key = secrets.token_bytes(32)
        self._until: OrderedDict[bytes, float] = OrderedDict()

    def digest(self, session_id: str, headers: Mapping[str, str], query: bytes) -> bytes:
        """A session with the credential of a request: the headers that may be one, and the query of its URL."""
        said = [session_id.encode()]
        for name in sorted(headers):
            if name not in _NO_CREDENTIAL and not name.startswith(_NO_CREDENTIAL_PREFIXES):
                value = headers[name].encode("utf-8", "surrogatepass")
                said.append(b"\0%b\0%d\0%b" % (name.encode("utf-8", "surrogatepass"), len(value), value))
        return hmac.digest(self._key, b"%b\0?%b" % (b"".join(said), query), "sha256")

    def add(self, digest: bytes) -> None:
        """The upstream has just taken it."""
        self._until[digest] = asyncio.get_running_loop().time() + self._lifetime
        self._until.move_to_end(digest)
        if len(self._until) > REMEMBERED:
            self._until.popitem(last=False)

    def remove(self, digest: bytes) -> None:
        """The upstream has just refused it."""
        self._until.pop(digest, None)

    def __contains__(self, digest: bytes) -> bool:
        until = self._until.get(digest)
        if until is None:
            return False
        if asyncio.get_running_loop().time() >= until:
            del self._until[digest]
            return False
        return True
