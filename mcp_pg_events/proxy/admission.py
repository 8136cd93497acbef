"""Who may have what of a session: asked of the upstream, for each credential anew after a while.

To whom the upstream gives nothing of a session, the session is unknown; and so is one that nobody has. Next:
`endpoint.py`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Final
from uuid import uuid4

from mcp_types import METHOD_NOT_FOUND
from starlette.requests import Request

from ..answers import Answer
from ..backend import SessionKey, SessionUnknown
from ..relayed import RelayedSession
from ..responses import session_id_of
from ..store import PostgresStore
from .credentials import Accepted
from .relay import Asker
from .relays import Relays
from .replies import answer_of, passed_on
from .upstream import EVENT_STREAM, Upstream, UpstreamFailed, forwarded_headers

__all__ = ["Admission", "Admitted"]

PROBE_TIMEOUT: Final = 10.0
HELD_PAUSE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request whose credential the upstream has taken for its session."""

    key: SessionKey
    session: RelayedSession
    asker: Asker
    digest: bytes


class Admission:
    """The upstream's word for each request. `patience`: how long (seconds) an upstream that does not answer is asked
    again for a request that can wait."""

    def __init__(
        self,
        store: PostgresStore,
        upstream: Upstream,
        relays: Relays,
        accepted: Accepted,
        *,
        name: str,
        idle_timeout: float | None,
        limit: int,
        patience: float,
        dropped_origins: frozenset[str],
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._relays = relays
        self._accepted = accepted
        self._name = name
        self._idle_timeout = idle_timeout
        self._limit = limit
        self._patience = patience
        self._dropped_origins = dropped_origins

    def asker(self, request: Request) -> Asker:
        """What the upstream is asked with in the place of a request's client."""
        headers = forwarded_headers(request)
        if "origin" in headers and not self._dropped_origins.isdisjoint(("*", headers["origin"])):
            # Allowed by this proxy, which stands for it; the upstream knows the pages on its own machine at most.
            del headers["origin"]
        return Asker(headers, request.scope.get("query_string", b""))

    def key(self, session_id: str) -> SessionKey:
        """A session of this proxy's. Whose it is, the upstream knows."""
        return SessionKey(session_id, self._name, None, self._idle_timeout)

    def opened(self, key: SessionKey, asker: Asker) -> None:
        """The upstream has just opened a session for a credential."""
        self._accepted.add(self._accepted.digest(key.session_id, asker.headers, asker.query))

    async def refused(self, admitted: Admitted, status: int) -> None:
        """The upstream has refused what it took before: its session has ended, or the credential has."""
        if status in (401, 403):
            self._accepted.remove(admitted.digest)
        elif status == 404:
            await self._relays.upstream_session_gone(admitted.key)

    async def admit(self, request: Request, *, held: bool = False) -> Admitted:
        """The session that a request names, once the upstream has taken the request's credential for it. `held`: an
        upstream that does not answer is asked again for a while.

        Raises:
            Answer: the upstream takes it not.
            SessionUnknown: there is none, or none of the asker's.
        """
        session_id = session_id_of(request)
        key = self.key(session_id)
        asker = self.asker(request)
        digest = self._accepted.digest(session_id, asker.headers, asker.query)
        session: RelayedSession | None
        try:
            session = await self._relays.find(key)
        except SessionUnknown:
            # Asked all the same, so that it looks like somebody else's.
            session = None
        if session is None or digest not in self._accepted:
            named = session_id if session is None else session.upstream
            deadline = asyncio.get_running_loop().time() + (self._patience if held else 0.0)
            while True:
                try:
                    await self._probe(named, asker)
                    break
                except UpstreamFailed:
                    # The SDK's client gives up after two refusals, so a GET waits.
                    waited = asyncio.get_running_loop().time() > deadline
                    if waited or self._store.draining or await request.is_disconnected():
                        raise
                    await asyncio.sleep(HELD_PAUSE)
            if session is None:
                raise SessionUnknown
            self._accepted.add(digest)
        return Admitted(key, session, asker, digest)

    async def _probe(self, upstream_session: str | None, asker: Asker) -> None:
        """Ask the upstream whether it takes a credential for a session, by a `ping` of it.

        Raises:
            Answer: it wants another credential, and says which.
            SessionUnknown: it refuses for whatever other reason.
        """
        ping = {"jsonrpc": "2.0", "id": f"ping-{uuid4().hex}", "method": "ping"}
        reply = await self._upstream.request(
            "POST",
            asker.headers,
            query=asker.query,
            body=json.dumps(ping).encode(),
            session_id=upstream_session,
            extra=(("content-type", "application/json"), ("accept", f"application/json, {EVENT_STREAM}")),
            timeout=PROBE_TIMEOUT,
        )
        answer = await answer_of(reply, ping["id"], self._limit, PROBE_TIMEOUT)
        if reply.status >= 500 or reply.status == 429:
            raise UpstreamFailed(f"The upstream answered {reply.status}")
        if reply.status == 401 or (reply.status == 403 and reply.header("www-authenticate") is not None):
            raise Answer(passed_on(reply, b""))
        error = answer.get("error") if isinstance(answer, dict) else None
        if not 200 <= reply.status < 300 or (isinstance(error, dict) and error.get("code") != METHOD_NOT_FOUND):
            raise SessionUnknown
