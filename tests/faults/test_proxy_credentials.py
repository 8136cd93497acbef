"""The upstream decides who may have what is stored; the proxy keeps no credential, and tells nobody of a session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.support.log import query
from tests.support.mcp_http import Response, Session
from tests.support.scripted_answers import cutting, event, going_on, note, sending
from tests.support.scripted_upstream import Exchange, ScriptedUpstream
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio

LIFETIME = 0.6
OPTIONS = {"proxy": {"credential_lifetime": LIFETIME, "patience": 2.0}, "log_level": "DEBUG"}
WHERE = 'Bearer resource_metadata="https://upstream.example/.well-known/oauth-protected-resource"'


class Guard:
    """An upstream that knows two users by their tokens; all sessions are Ann's."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.owners = {"Bearer ann-1"}
        self.others = {"Bearer bob-1"}
        self.asked: list[tuple[str, str | None]] = []
        upstream.on_other = self.refuses

    async def refuses(self, exchange: Exchange) -> bool:
        token = exchange.header("authorization")
        method = (exchange.message or {}).get("method") if exchange.method == "POST" else None
        self.asked.append((method or exchange.method, token))
        if token in self.owners or (token in self.others and method == "initialize"):
            return False
        if token in self.others:
            await exchange.whole("404 Not Found", b"no such session here", content_type="text/plain")
        else:
            await exchange.whole("401 Unauthorized", b"secret of the upstream", www_authenticate=WHERE)
        return True


@pytest.fixture(scope="module")
async def replicas(scripted_once: ScriptedUpstream, migrated_once: str) -> AsyncIterator[Workers]:
    environment = {"TEST_UPSTREAM": scripted_once.url}
    async with run_workers("proxied_app", migrated_once, 2, environment=environment, options=OPTIONS) as workers:
        yield workers


@pytest.fixture
def guard(upstream: ScriptedUpstream) -> Guard:
    return Guard(upstream)


async def of_ann(replicas: Workers, token: str = "Bearer ann-1") -> Session:
    return await Session.initialize(replicas[0].url, headers={"Authorization": token})


def with_token(session: Session, token: str | None) -> Session:
    """The same session, asked for by somebody else."""
    other = Session(session.base_url, headers={} if token is None else {"Authorization": token})
    other.session_id, other.version = session.session_id, session.version
    return other


async def stored_call(session: Session, upstream: ScriptedUpstream) -> str:
    """A call that is over; the id of its first event."""
    upstream.on_call = [sending(event(note(1)), event(note(2)))]
    events = [each async for each in (await session.call("x")).events() if each.data]
    assert len(events) == 3
    assert events[0].id is not None
    return events[0].id


async def answer_to(response: Response) -> tuple[int, dict[str, str], bytes]:
    headers = {name: value for name, value in response.headers.items() if name != "date"}
    return response.status, headers, await response.read()


@pytest.mark.parametrize("replica", [0, 1])
async def test_what_is_stored_is_served_to_whom_the_upstream_accepts(
    replica: int, replicas: Workers, upstream: ScriptedUpstream, guard: Guard
) -> None:
    session = await of_ann(replicas)
    first = await stored_call(session, upstream)
    url = replicas[replica].url
    for token in (None, "Bearer made-up"):
        guard.asked.clear()
        for refused in (
            await with_token(session, token).get(first, base_url=url),
            await with_token(session, token).get(base_url=url),
            await with_token(session, token).call("x", base_url=url),
        ):
            status, headers, body = await answer_to(refused)
            assert (status, headers["www-authenticate"], body) == (401, WHERE, b"")
        assert guard.asked == [("ping", token)] * 3, "the call itself is not sent on"
    resumed = await session.get(first, base_url=url)
    assert resumed.status == 200
    assert [each.id for each in [e async for e in resumed.events() if e.data]] != []


async def test_another_replica_asks_for_itself_and_once(
    replicas: Workers, upstream: ScriptedUpstream, guard: Guard
) -> None:
    session = await of_ann(replicas)
    first = await stored_call(session, upstream)
    guard.asked.clear()
    for _ in range(2):
        assert (await session.get(first, base_url=replicas[1].url)).status == 200
    assert guard.asked == [("ping", "Bearer ann-1")]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "notification"])
async def test_a_foreign_session_looks_like_one_that_is_not(
    method: str, replicas: Workers, upstream: ScriptedUpstream, guard: Guard
) -> None:
    session = await of_ann(replicas)
    first = await stored_call(session, upstream)
    foreign = with_token(session, "Bearer bob-1")
    unknown = with_token(session, "Bearer bob-1")
    unknown.session_id = "0" * 32

    async def ask(asker: Session) -> tuple[Any, Any]:
        guard.asked.clear()
        match method:
            case "GET":
                response = await asker.get(first)
            case "POST":
                response = await asker.call("x")
            case "DELETE":
                response = await asker.delete()
            case _:
                response = await asker.post({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return await answer_to(response), list(guard.asked)

    assert await ask(foreign) == await ask(unknown)
    status, _, body = (await ask(foreign))[0]
    assert status == 404 and b"upstream" not in body and b"no such session here" not in body
    # It is Ann's as before.
    assert (await session.get(first)).status == 200


async def test_a_token_that_is_revoked_is_believed_for_its_lifetime_at_most(
    replicas: Workers, upstream: ScriptedUpstream, guard: Guard
) -> None:
    session = await of_ann(replicas)
    first = await stored_call(session, upstream)
    guard.owners.clear()
    assert (await session.get(first)).status == 200
    await asyncio.sleep(LIFETIME)
    assert (await session.get(first)).status == 401
    # What the upstream refuses itself is not believed for a moment longer.
    guard.owners.add("Bearer ann-1")
    assert (await session.get(first)).status == 200
    guard.owners.clear()
    assert (await session.call("x")).status == 401
    assert (await session.get(first)).status == 401


async def test_a_call_goes_on_with_a_fresh_token(replicas: Workers, upstream: ScriptedUpstream, guard: Guard) -> None:
    session = await of_ann(replicas)
    upstream.on_call = [cutting(event(note(1), "a"))]
    upstream.on_get = [going_on(upstream.requests, event(note(2), "b"))]

    async def expires(exchange: Exchange) -> bool:
        if exchange.method == "GET":
            guard.owners = {"Bearer ann-2"}
        return await Guard.refuses(guard, exchange)

    upstream.on_other = expires
    response = await session.call("x")
    events = [each async for each in response.events()]
    assert response.complete, "its reader is sent to come back with another token"
    assert "result" not in events[-1].data
    fresh = with_token(session, "Bearer ann-2")
    again = await fresh.get(events[-1].id, base_url=replicas[1].url)
    seen = [each.message for each in [*events, *[e async for e in again.events()]] if each.data]
    assert [each["params"]["progress"] for each in seen[:-1]] == [1, 2]
    assert "result" in seen[-1]


async def test_no_credential_is_stored_or_logged(
    replicas: Workers, upstream: ScriptedUpstream, guard: Guard, migrated_once: str
) -> None:
    secrets = ("ann-secret-1", "cookie-secret-2", "key-secret-3", "query-secret-4")
    guard.owners = {f"Bearer {secrets[0]}"}
    headers = {"Authorization": f"Bearer {secrets[0]}", "Cookie": f"s={secrets[1]}", "X-Api-Key": secrets[2]}
    session = await Session.initialize(replicas[0].url, headers=headers, path=f"/mcp?key={secrets[3]}")
    first = await stored_call(session, upstream)
    assert (await session.get(first, base_url=replicas[1].url)).status == 200
    upstream.on_call = [cutting(event(note(1), "a"))]
    upstream.on_get = [going_on(upstream.requests)]
    assert "result" in (await (await session.call("y")).result())
    upstream.on_call = [cutting()]
    assert "error" in (await (await session.call("z")).result())
    for asked in upstream.requests:
        assert asked.header("cookie") == f"s={secrets[1]}" and asked.target.endswith(secrets[3])
    tables = ("sessions", "streams", "events", "inbox", "workers", "settings")
    kept = "\n".join(str(query(migrated_once, f"SELECT * FROM {table}")) for table in tables)  # type: ignore[arg-type]  # names of ours
    written = "\n".join(worker.output() for worker in replicas.members)
    assert "DEBUG" in written
    for secret in secrets:
        assert secret not in kept
        # uvicorn's access log has the target, and is off: here, and in `mcp-pg-events proxy --upstream`.
        assert secret not in written
