"""The options that an app was built with hold when it is durable, and hold for all workers together."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import mcp_types as types
import pytest
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server
from mcp.server.transport_security import TransportSecuritySettings
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response as StarletteResponse

from mcp_pg_events import PostgresStore, durable
from tests.integration.apps import (
    ACCEPT,
    FRAMEWORKS,
    assert_durable,
    fastmcp,
    http_app,
    initialize_message,
    initialize_status,
    mcpserver,
)
from tests.support.log import parts, query
from tests.support.mcp_http import Response, Session, request
from tests.support.serving import serving

pytestmark = pytest.mark.anyio


@contextlib.asynccontextmanager
async def workers(dsn: str, *apps: Any, **options: Any) -> AsyncIterator[list[str]]:
    """Each app made durable and served, as a worker of its own."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(serving(durable(app, dsn, **options))) for app in apps]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the tool `wait` looks for its files."""
    monkeypatch.setenv("TEST_DIRECTORY", str(tmp_path))
    return tmp_path


async def waiting(keys: Path, key: str) -> None:
    """Return when the call of `wait(key)` waits."""
    async with asyncio.timeout(10):
        while not (keys / f"{key}.waiting").exists():  # noqa: ASYNC110 (the tool makes it)
            await asyncio.sleep(0.005)


# --- limits on requests -----------------------------------------------------------------------------------------------

LOCAL = TransportSecuritySettings(allowed_hosts=["good.test"], allowed_origins=["https://good.test"])
HOSTS = [
    ({"Host": "good.test"}, 200),
    ({"Host": "good.test", "Origin": "https://good.test"}, 200),
    ({"Host": "evil.test"}, 421),
    ({"Host": "good.test", "Origin": "https://evil.test"}, 403),
]


@pytest.mark.parametrize(
    "app",
    [
        mcpserver().streamable_http_app(transport_security=LOCAL),
        fastmcp().http_app(
            host_origin_protection=True, allowed_hosts=["good.test"], allowed_origins=["https://good.test"]
        ),
    ],
    ids=FRAMEWORKS,
)
async def test_hosts_and_origins_are_checked(app: Any, migrated_once: str) -> None:
    async with workers(migrated_once, app) as (url,):
        for headers, expected in HOSTS:
            for era in ({}, {"MCP-Protocol-Version": "2026-07-28"}):
                response = await request(
                    "POST", f"{url}/mcp", headers=ACCEPT | headers | era, body=initialize_message()
                )
                await response.read()
                # A handshake in the other era is a bad request once it has passed the check.
                assert response.status == (400 if era and expected == 200 else expected), (headers, era)


async def test_a_server_for_localhost_checks_hosts_by_itself(migrated_once: str) -> None:
    async with workers(migrated_once, mcpserver().streamable_http_app()) as (url,):
        for method in ("POST", "GET", "DELETE"):
            refused = await request(
                method, f"{url}/mcp", headers={"Host": "evil.test", "Content-Type": "application/json"}
            )
            assert refused.status == 421, method


async def chunked(url: str, body: bytes, headers: dict[str, str]) -> Response:
    """POST `body` in chunks, without saying how long it is."""
    pieces = b"".join(
        b"%x\r\n%b\r\n" % (len(body[at : at + 500]), body[at : at + 500]) for at in range(0, len(body), 500)
    )
    more = {"Transfer-Encoding": "chunked", "Content-Type": "application/json"}
    response = await request("POST", f"{url}/mcp", headers=headers | more, body=pieces + b"0\r\n\r\n")
    await response.read()
    return response


@pytest.mark.parametrize("era", ["2025-11-25", "2026-07-28"])
async def test_bodies_beyond_the_limit_get_413(era: str, migrated_once: str) -> None:
    app = mcpserver().streamable_http_app(max_request_body_size=2000)
    async with workers(migrated_once, app) as (url,):
        session = await Session.initialize(url)
        headers = session.headers(**{"MCP-Protocol-Version": era})
        body = json.dumps({"jsonrpc": "2.0", "method": "notifications/x", "params": {"x": "y" * 3000}}).encode()
        response = await request("POST", f"{url}/mcp", headers=headers, body=body)
        assert (response.status, await response.read()) == (413, b"Request body too large")
        assert (await chunked(url, body, headers)).status == 413
        small = json.dumps({"jsonrpc": "2.0", "method": "notifications/x", "params": {"x": "y" * 1000}}).encode()
        assert (await chunked(url, small, headers)).status == 202
        assert await session.call_result("echo", {"text": "still here"}) == "still here"


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_priming_events_carry_the_retry_interval(framework: str, migrated_once: str) -> None:
    apps = [http_app(FRAMEWORKS[framework](), **options) for options in ({"retry_interval": 1234}, {})]
    async with workers(migrated_once, *apps) as urls:
        session = await Session.initialize(urls[0])
        for url, expected in zip(urls, (1234, None), strict=True):
            closed = [e async for e in (await session.call("close_stream", {"n": 1}, base_url=url)).events()]
            resumed = await anext((await session.get(closed[0].id, base_url=url)).events())
            standalone = await anext((await session.get(base_url=url)).events())
            primings = [event for event in (*closed, resumed, standalone) if event.data == ""]
            assert [event.retry for event in primings] == [expected] * 4, (
                "Begin, close, resume and listen have one each."
            )


# --- limits on sessions -----------------------------------------------------------------------------------------------


async def test_max_sessions_holds_for_workers_that_open_them_at_once(migrated_once: str) -> None:
    apps = [mcpserver("limited").streamable_http_app(max_sessions=5) for _ in range(2)]
    async with workers(migrated_once, *apps) as urls:
        statuses = await asyncio.gather(*(initialize_status(urls[n % 2]) for n in range(30)))
        assert sorted(statuses) == [200] * 5 + [503] * 25
        assert await initialize_status(urls[0]) == 503


async def test_a_session_that_ends_anywhere_makes_room_for_another(migrated_once: str) -> None:
    apps = [mcpserver("crowded").streamable_http_app(max_sessions=2, session_idle_timeout=60) for _ in range(2)]
    async with workers(migrated_once, *apps) as urls:
        first, second = [await Session.initialize(url) for url in urls]
        refused = await request("POST", f"{urls[0]}/mcp", headers=ACCEPT, body=initialize_message())
        assert refused.status == 503
        assert (await refused.json())["error"] == {"code": types.INTERNAL_ERROR, "message": "Too many open sessions"}
        assert await second.call_result("echo", {"text": "x"}) == "x"
        assert (await first.delete(base_url=urls[1])).status == 200
        assert await initialize_status(urls[0]) == 200
        assert await initialize_status(urls[0]) == 503
        # One that has been idle for too long takes no room either, before anybody has ended it.
        query(migrated_once, "UPDATE sessions SET seen_at = now() - interval '1 h' WHERE id = %s", second.session_id)
        assert await initialize_status(urls[1]) == 200


async def test_the_idle_timeout_goes_by_the_clock_of_the_database(migrated_once: str) -> None:
    apps = [http_app(make("idle"), session_idle_timeout=600) for make in FRAMEWORKS.values()]
    async with workers(migrated_once, *apps) as urls:
        session = await Session.initialize(urls[0])
        priming = await anext((await session.call("echo", {"text": "x"}, base_url=urls[1])).events())
        query(
            migrated_once, "UPDATE sessions SET seen_at = seen_at - interval '500 s' WHERE id = %s", session.session_id
        )
        assert await session.call_result("echo", {"text": "not yet"}, base_url=urls[1]) == "not yet"
        query(
            migrated_once, "UPDATE sessions SET seen_at = seen_at - interval '601 s' WHERE id = %s", session.session_id
        )
        for url in urls:
            for response in (
                await session.call("echo", {"text": "x"}, base_url=url),
                await session.get(priming.id, base_url=url),
                await session.get(base_url=url),
                await session.delete(base_url=url),
            ):
                assert response.status == 404


@pytest.mark.parametrize(("idle", "warned"), [(3 * 86400.0, True), (None, True), (86400.0, False)])
async def test_events_that_go_before_an_idle_session_does_are_warned_of(
    idle: float | None, warned: bool, migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = mcpserver("idle").streamable_http_app(session_idle_timeout=idle)
    durable(app, PostgresStore(migrated_once, retention=timedelta(days=2)))
    async with app.router.lifespan_context(app):
        pass
    assert ("Events are kept for 2 days" in caplog.text) == warned


async def ended_by_idling(dsn: str, session: Session) -> None:
    """Return when a worker has ended the session."""
    async with asyncio.timeout(20):
        ended = "SELECT 1 FROM sessions WHERE id = %s AND ended_reason = 'idle'"
        while not query(dsn, ended, session.session_id):  # noqa: ASYNC110 (a row that another worker changes)
            await asyncio.sleep(0.05)


async def test_a_running_call_and_an_attached_get_hold_off_the_idle_timeout(migrated_once: str, keys: Path) -> None:
    apps = [mcpserver("busy").streamable_http_app(session_idle_timeout=0.8) for _ in range(2)]
    async with workers(migrated_once, *apps) as urls:
        calling, listening = [await Session.initialize(urls[0]) for _ in range(2)]
        call = await calling.call("wait", {"key": "k"}, base_url=urls[1])
        priming = await anext(call.events())
        await waiting(keys, "k")
        call.cut()
        standalone = await listening.get(base_url=urls[1])
        for _ in range(2):
            # Sessions that do nothing come and go meanwhile.
            await ended_by_idling(migrated_once, await Session.initialize(urls[0]))
        for session in (calling, listening):
            assert await session.call_result("echo", {"text": "x"}, base_url=urls[0]) == "x"
        (keys / "k").touch()
        assert "result" in await (await calling.get(priming.id, base_url=urls[0])).result()
        standalone.close()
        # Once they are left alone they end as well.
        await asyncio.gather(*(ended_by_idling(migrated_once, session) for session in (calling, listening)))


async def test_a_session_that_ended_elsewhere_is_let_go(migrated_once: str) -> None:
    """Or its memory would be held for as long as an idle session's, though it counts for no limit any more."""
    stores = [PostgresStore(migrated_once) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        urls = [
            await stack.enter_async_context(serving(durable(mcpserver().streamable_http_app(), store)))
            for store in stores
        ]
        held: list[Any] = [parts(store).apps[0].session_ended.__self__ for store in stores]  # type: ignore[attr-defined]
        sessions = [await Session.initialize(urls[0]) for _ in range(3)]
        for session in sessions:
            await session.call_result("echo", {"text": "x"}, base_url=urls[1])
        assert [len(each) for each in held] == [3, 3]
        for session in sessions:
            assert (await session.delete()).status == 200
        async with asyncio.timeout(5):
            while any(len(each) for each in held):  # noqa: ASYNC110 (the other worker is told in its own time)
                await asyncio.sleep(0.01)


# --- answers in JSON --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", FRAMEWORKS)
async def test_json_response_answers_in_json_and_asks_the_client_nothing(framework: str, migrated_once: str) -> None:
    plain = http_app(FRAMEWORKS[framework](), json_response=True)
    apps = [http_app(FRAMEWORKS[framework](), json_response=True) for _ in range(2)]
    async with workers(migrated_once, *apps) as urls, serving(plain) as undurable:
        answers = []
        for url, elsewhere in ((urls[0], urls[1]), (undurable, undurable)):
            session = await Session.initialize(url, capabilities={"elicitation": {}})
            for tool, arguments in (
                ("echo", {"text": "x"}),
                ("count", {"n": 3, "seconds": 0}),
                ("ask", {"question": "?"}),
                ("close_stream", {"n": 1}),
            ):
                response = await session.post(
                    {
                        "jsonrpc": "2.0",
                        "id": tool,
                        "method": "tools/call",
                        "params": {"name": tool, "arguments": arguments, "_meta": {"progressToken": "t"}},
                    },
                    base_url=elsewhere,
                    headers={"Accept": "application/json"},
                )
                assert response.headers["mcp-session-id"] == session.session_id
                answers.append((response.status, response.headers["content-type"], await response.json()))
        durably, plainly = answers[:4], answers[4:]
        assert durably[:3] == plainly[:3]
        assert durably[0][2]["result"]["content"][0]["text"] == "x"
        refused = durably[2][2]
        assert "error" in refused or refused["result"]["isError"], refused
        # There is nothing to come back to, so there is nothing to close.
        assert durably[3][2]["result"]["content"][0]["text"] == "closed after 1"


async def test_a_call_in_json_finishes_while_its_worker_drains(migrated_once: str, keys: Path) -> None:
    store = PostgresStore(migrated_once)
    async with serving(durable(mcpserver().streamable_http_app(json_response=True), store)) as url:
        session = await Session.initialize(url)
        call = asyncio.create_task(session.call("wait", {"key": "k"}))
        await waiting(keys, "k")
        drained = asyncio.create_task(store.drain())
        assert await initialize_status(url) == 503
        (keys / "k").touch()
        assert (await (await call).json())["result"]["content"][0]["text"] == "waited for k"
        await drained


async def test_a_call_in_json_that_does_not_finish_in_time_gets_the_shutdowns_error(
    migrated_once: str, keys: Path
) -> None:
    store = PostgresStore(migrated_once, drain_timeout=0.2)
    async with serving(durable(mcpserver().streamable_http_app(json_response=True), store)) as url:
        session = await Session.initialize(url)
        call = asyncio.create_task(session.call("wait", {"key": "never"}))
        await waiting(keys, "never")
        await store.drain()
        assert (await (await call).json())["error"]["data"] == {"reason": "shutdown"}


# --- FastMCP's own ----------------------------------------------------------------------------------------------------


class Stamp(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> StarletteResponse:
        response = await call_next(request)
        response.headers["X-Stamp"] = "stamped"
        return response


@pytest.mark.parametrize("path", ["/", "/custom/path"])
async def test_fastmcps_path_and_middleware_are_kept(path: str, migrated_once: str) -> None:
    app = fastmcp().http_app(path=path, middleware=[Middleware(Stamp)])
    async with workers(migrated_once, app) as (url,):
        session = await assert_durable(url, path)
        response = await session.call("echo", {"text": "x"})
        assert response.headers["x-stamp"] == "stamped"
        assert "result" in await response.result()


# --- who may ----------------------------------------------------------------------------------------------------------


async def test_a_stranger_does_not_wait_for_a_session_that_is_being_restored(migrated_once: str) -> None:
    entered, leave = asyncio.Event(), asyncio.Event()

    def server(slow: bool) -> Server[Any]:
        async def subscribe(ctx: ServerRequestContext, params: types.SubscribeRequestParams) -> types.EmptyResult:
            if slow:
                entered.set()
                await leave.wait()
            return types.EmptyResult()

        return Server("restoring", on_subscribe_resource=subscribe)

    def owner(scope: Any) -> str:
        return str(dict(scope["headers"]).get(b"x-owner", b"").decode())

    apps = [server(slow).streamable_http_app() for slow in (False, True)]
    async with workers(migrated_once, *apps, owner=owner) as (url, slow):
        session = await Session.initialize(url, headers={"X-Owner": "ann"})
        await (await session.request("resources/subscribe", {"uri": "test://a"})).result()
        restoring = asyncio.create_task(session.request("ping", base_url=slow))
        await entered.wait()
        stranger = Session(slow, headers={"X-Owner": "bob"})
        stranger.session_id = session.session_id
        refused = await asyncio.wait_for(stranger.request("ping"), 2)
        assert refused.status == 404
        assert not restoring.done()
        leave.set()
        assert "result" in await (await restoring).result()


@pytest.mark.parametrize(("one", "two"), [("a\0", "a\ufffd"), ("a\udcff", "a\udcfe"), ("a", "a ")])
async def test_owners_that_look_alike_are_told_apart(one: str, two: str, migrated_once: str) -> None:
    owners = iter([one, one, one, two, one])
    async with workers(migrated_once, mcpserver().streamable_http_app(), owner=lambda _: next(owners)) as (url,):
        session = await Session.initialize(url)
        assert (await session.request("ping")).status == 200
        assert (await session.request("ping")).status == 404
        assert (await session.request("ping")).status == 200
