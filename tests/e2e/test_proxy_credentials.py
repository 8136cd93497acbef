"""An upstream of the SDK's with bearer tokens, behind two replicas: its word decides, theirs adds nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from psycopg import sql

from tests.support.log import query
from tests.support.mcp_http import Response, Session, close_all
from tests.support.workers import Workers, run_workers

pytestmark = pytest.mark.anyio

STRANGERS = ["bob", "ann-by-another-client", "ann-of-another-issuer"]


@pytest.fixture(scope="module")
async def deployed(migrated_once: str, anyio_backend: str) -> AsyncIterator[tuple[Workers, Workers]]:
    async with run_workers("auth_mcpserver_app", None, 1) as upstream:
        environment = {"TEST_UPSTREAM": f"{upstream[0].url}/mcp"}
        options = {"log_level": "DEBUG", "proxy": {"credential_lifetime": 600.0}}
        async with run_workers("proxied_app", migrated_once, 2, environment=environment, options=options) as replicas:
            yield replicas, upstream


@pytest.fixture
def replicas(deployed: tuple[Workers, Workers]) -> Any:
    for workers in deployed:
        workers.forget()
    yield deployed[0]
    close_all()
    deployed[0].assert_clean_logs()


def bearing(token: str | None, session: Session | None = None) -> Session:
    """A session of somebody with this token, who knows the id of another's."""
    made = Session("", headers={} if token is None else {"Authorization": f"Bearer {token}"})
    if session is not None:
        made.base_url, made.session_id, made.version = session.base_url, session.session_id, session.version
    return made


async def open_session(replicas: Workers, token: str = "ann") -> Session:
    return await Session.initialize(replicas[0].url, headers={"Authorization": f"Bearer {token}"})


async def parts_of(response: Response) -> tuple[int, dict[str, str], bytes]:
    headers = {name: value for name, value in response.headers.items() if name != "date"}
    return response.status, headers, await response.read()


@pytest.mark.parametrize("token", [None, "nobody"])
async def test_who_has_no_token_is_told_what_the_upstream_wants(
    token: str | None, replicas: Workers, deployed: tuple[Workers, Workers]
) -> None:
    session = await open_session(replicas)
    nobody = bearing(token, session)
    direct = await bearing(token, session).post(
        {"jsonrpc": "2.0", "id": 1, "method": "ping"}, base_url=deployed[1][0].url
    )
    wanted = direct.headers["www-authenticate"]
    assert direct.status == 401 and wanted.startswith("Bearer")
    for url in replicas.urls:
        for refused in (
            await nobody.get("1-1", base_url=url),
            await nobody.get(base_url=url),
            await nobody.call("echo", {"text": "x"}, base_url=url),
            await nobody.delete(base_url=url),
        ):
            assert (refused.status, refused.headers["www-authenticate"]) == (401, wanted)
    nobody.session_id = None
    refused = await nobody.request("initialize", {"protocolVersion": "2025-11-25"}, id=0, base_url=replicas[0].url)
    assert (refused.status, refused.headers["www-authenticate"]) == (401, wanted)
    assert (await session.delete(base_url=replicas[1].url)).status == 200


@pytest.mark.parametrize("stranger", STRANGERS)
async def test_a_session_is_its_principals_alone_on_every_replica(stranger: str, replicas: Workers) -> None:
    session = await open_session(replicas)
    response = await session.call("count", {"n": 3, "seconds": 0.1}, progress_token="t")
    events = [event async for event in response.events() if event.data]
    for url in replicas.urls:
        foreign, unknown = bearing(stranger, session), bearing(stranger, session)
        unknown.session_id = "0" * 32
        for ask in (
            lambda asker, url=url: asker.get(events[0].id, base_url=url),
            lambda asker, url=url: asker.get(base_url=url),
            lambda asker, url=url: asker.call("echo", {"text": "x"}, base_url=url),
            lambda asker, url=url: asker.delete(base_url=url),
        ):
            answer = await parts_of(await ask(foreign))
            assert answer == await parts_of(await ask(unknown))
            assert answer[0] == 404 and b"counted" not in answer[2]
        # A renewed token of the same principal's is as good as the first.
        resumed = await bearing("ann-renewed", session).get(events[0].id, base_url=url)
        got = [event async for event in resumed.events() if event.data]
        assert [event.id for event in got] == [event.id for event in events[1:]]


async def test_a_stranger_with_a_session_of_his_own_gets_nothing_of_anothers(replicas: Workers) -> None:
    ann, bob = await open_session(replicas), await open_session(replicas, "bob")
    running = await ann.call("count", {"n": 20, "seconds": 1.0}, id="mine", progress_token="t")
    first = await anext(event async for event in running.events() if event.id)
    stranger = await bob.get(first.id, base_url=replicas[1].url)
    nothing = await bob.get("999999999-1", base_url=replicas[1].url)
    assert await parts_of(stranger) == await parts_of(nothing)
    assert stranger.status == 400
    # Nor does the id of a running call of Ann's mean anything in his.
    echoed = await (await bob.call("echo", {"text": "b"}, id="mine")).result()
    assert echoed["result"]["content"][0]["text"] == "b"


async def test_no_token_is_in_any_table_or_log(replicas: Workers, migrated_once: str) -> None:
    session = await open_session(replicas, "ann-renewed")
    assert await session.call_result("echo", {"text": "kept"}) == "kept"
    assert (await bearing("ann-of-another-issuer", session).get(base_url=replicas[1].url)).status == 404
    tables = query(
        migrated_once, "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'mcp_events'::regnamespace"
    )
    kept = "".join(str(query(migrated_once, sql.SQL("TABLE {}").format(sql.Identifier(name)))) for (name,) in tables)
    written = "".join(worker.log.read_text() for worker in replicas.members)
    assert "kept" in kept and "DEBUG" in written
    for token in ("ann-renewed", "ann-of-another-issuer"):
        assert token not in kept and token not in written
