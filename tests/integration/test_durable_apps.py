"""How a durable app is put together with others: mounted, with its lifespan or without, beside another one.

Wherever it is, it is durable, or it answers 500 and its log says what to do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastmcp import FastMCP
from mcp.server.mcpserver import Context, MCPServer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from mcp_pg_events import PostgresStore, durable
from mcp_pg_events.errors import ConfigurationError
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
from tests.support.log import query
from tests.support.mcp_http import Session, request
from tests.support.serving import serving

pytestmark = pytest.mark.anyio

RECIPE = "pass it on"
MODERN = {**ACCEPT, "MCP-Protocol-Version": "2026-07-28", "Mcp-Method": "server/discover"}


@pytest.fixture(params=FRAMEWORKS)
def server(request: pytest.FixtureRequest) -> Any:
    return FRAMEWORKS[request.param]()


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


OUTER: dict[str, Callable[[Any], Any]] = {
    "starlette": lambda lifespan: Starlette(routes=[Route("/hello", hello)], lifespan=lifespan),
    "fastapi": lambda lifespan: FastAPI(routes=[Route("/hello", hello)], lifespan=lifespan),
}


@pytest.fixture(params=OUTER)
def outer(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Makes an app with a route of its own and the given lifespan."""
    return OUTER[request.param]


async def assert_refused_with_the_recipe(url: str, log: pytest.LogCaptureFixture, path: str = "/mcp") -> None:
    """Requests of both eras get a 500 with a JSON-RPC error; the log has the recipe, once."""
    for headers in (ACCEPT, MODERN, ACCEPT):
        response = await request("POST", url + path, headers=headers, body=initialize_message())
        assert response.status == 500, await response.read()
        assert "lifespan" in (await response.json())["error"]["message"]
    assert [RECIPE in record.message for record in log.records if record.levelname == "ERROR"] == [True]


# --- by itself --------------------------------------------------------------------------------------------------------


async def test_an_app_by_itself_is_durable_and_answers_without_a_redirect(server: Any, migrated_once: str) -> None:
    async with serving(durable(http_app(server), migrated_once)) as url:
        session = await assert_durable(url)
    found = query(migrated_once, "SELECT server, ended_at FROM sessions WHERE id = %s", session.session_id)
    assert found == [("one", None)]


async def test_without_any_lifespan_every_request_gets_500_and_the_log_has_the_recipe(
    server: Any, migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(durable(http_app(server), migrated_once), lifespan="off") as url:
        await assert_refused_with_the_recipe(url, caplog)


async def test_what_the_servers_lifespan_yields_reaches_the_handlers_also_of_a_restored_session(
    migrated_once: str,
) -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[dict[str, str]]:
        yield {"state": "of this server"}

    one, two = [MCPServer("one", lifespan=lifespan) for _ in range(2)]
    three = FastMCP("one", lifespan=lifespan)

    async def state(ctx: Context) -> str:
        return str(ctx.request_context.lifespan_context["state"])

    async def fastmcp_state() -> str:
        from fastmcp.server.dependencies import get_context

        return str(get_context().lifespan_context["state"])

    one.tool(name="state")(state)
    two.tool(name="state")(state)
    three.tool(name="state")(fastmcp_state)
    async with contextlib.AsyncExitStack() as stack:
        urls = [
            await stack.enter_async_context(serving(durable(http_app(one), migrated_once))) for one in (one, two, three)
        ]
        session = await Session.initialize(urls[0])
        for url in urls:
            assert await session.call_result("state", base_url=url) == "of this server"


async def test_custom_routes_are_served_as_before(server: Any, migrated_once: str) -> None:
    server.custom_route("/health", methods=["GET"])(hello)
    async with serving(durable(http_app(server), migrated_once)) as url:
        response = await request("GET", url + "/health")
        assert (response.status, await response.read()) == (200, b"hello")
        await assert_durable(url)


# --- mounted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/api"])
async def test_a_mounted_app_whose_lifespan_is_passed_on_is_durable(
    server: Any, outer: Callable[[Any], Any], prefix: str, migrated_once: str
) -> None:
    app = durable(http_app(server), migrated_once)
    around = outer(app.router.lifespan_context)
    around.mount(prefix, app)
    async with serving(around) as url:
        await assert_durable(url, f"{prefix}/mcp")
        assert await (await request("GET", url + "/hello")).read() == b"hello"


async def test_a_lifespan_of_ones_own_may_enter_the_apps(
    server: Any, outer: Callable[[Any], Any], migrated_once: str
) -> None:
    app = durable(http_app(server), migrated_once)

    @contextlib.asynccontextmanager
    async def lifespan(around: Any) -> AsyncIterator[None]:
        async with app.router.lifespan_context(app):
            yield

    around = outer(lifespan)
    around.mount("/", app)
    async with serving(around) as url:
        await assert_durable(url)


async def test_a_lifespan_may_run_the_sdks_session_manager(outer: Callable[[Any], Any], migrated_once: str) -> None:
    server = mcpserver()
    app = durable(server.streamable_http_app(), migrated_once)

    @contextlib.asynccontextmanager
    async def lifespan(around: Any) -> AsyncIterator[None]:
        async with server.session_manager.run():
            yield

    around = outer(lifespan)
    around.mount("/", app)
    async with serving(around) as url:
        await assert_durable(url)


async def test_a_mounted_app_without_its_lifespan_gets_500_and_the_recipe(
    server: Any, outer: Callable[[Any], Any], migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    around = outer(None)
    around.mount("/", durable(http_app(server), migrated_once))
    async with serving(around) as url:
        await assert_refused_with_the_recipe(url, caplog)
        assert await (await request("GET", url + "/hello")).read() == b"hello"


async def test_a_lifespan_taken_before_durable_is_never_undurable_in_silence(
    server: Any, outer: Callable[[Any], Any], migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = http_app(server)
    around = outer(app.router.lifespan_context)
    around.mount("/", durable(app, migrated_once))
    async with serving(around) as url:
        if isinstance(server, FastMCP):
            await assert_refused_with_the_recipe(url, caplog)
        else:
            # The SDK's lifespan asks its manager when it runs, not when it is taken.
            await assert_durable(url)


async def test_an_outer_app_can_be_made_durable(server: Any, outer: Callable[[Any], Any], migrated_once: str) -> None:
    app = http_app(server)
    around = outer(app.router.lifespan_context)
    around.mount("/", app)
    async with serving(durable(around, migrated_once)) as url:
        await assert_durable(url)


async def test_an_outer_app_made_durable_that_runs_no_lifespan_gets_500_and_the_recipe(
    server: Any, outer: Callable[[Any], Any], migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    around = outer(None)
    around.mount("/", http_app(server))
    async with serving(durable(around, migrated_once)) as url:
        await assert_refused_with_the_recipe(url, caplog)
        assert await (await request("GET", url + "/hello")).read() == b"hello"


# --- two in one process -----------------------------------------------------------------------------------------------


def beside(one: Any, two: Any, ending: asyncio.Event | None = None) -> Starlette:
    """Both apps in one process, each with its lifespan. `ending` is set when these begin to end."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        async with one.router.lifespan_context(one), two.router.lifespan_context(two):
            yield
            if ending is not None:
                ending.set()

    return Starlette(routes=[Mount("/one", one), Mount("/two", two)], lifespan=lifespan)


@pytest.mark.parametrize("shared", [True, False], ids=["one store", "a store each"])
@pytest.mark.parametrize("other", FRAMEWORKS)
async def test_two_apps_in_one_process_are_durable_and_strangers(shared: bool, other: str, migrated_once: str) -> None:
    stores = [PostgresStore(migrated_once)] * 2 if shared else [PostgresStore(migrated_once) for _ in range(2)]
    one = durable(http_app(mcpserver("one")), stores[0])
    two = durable(http_app(FRAMEWORKS[other]("two")), stores[1])
    async with serving(beside(one, two)) as url:
        for path, elsewhere in (("/one/mcp", "/two/mcp"), ("/two/mcp", "/one/mcp")):
            session = await assert_durable(url, path)
            session.path = elsewhere
            assert (await session.call("echo", {"text": "x"})).status == 404
        assert query(migrated_once, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(1 if shared else 2,)]
    assert query(migrated_once, "SELECT count(*) FROM workers WHERE ended_at IS NULL") == [(0,)]


@pytest.mark.parametrize("which", ["one", "two"])
async def test_two_apps_of_one_store_let_calls_finish_when_they_leave(
    which: str, migrated_once: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_DIRECTORY", str(tmp_path))
    store = PostgresStore(migrated_once)
    apps = [durable(http_app(mcpserver(name)), store) for name in ("one", "two")]
    ending = asyncio.Event()
    async with serving(durable(http_app(mcpserver(which)), migrated_once)) as remaining:
        leaving = contextlib.AsyncExitStack()
        url = await leaving.enter_async_context(serving(beside(*apps, ending)))
        session = await Session.initialize(url, path=f"/{which}/mcp")
        call = await session.call("wait", {"key": "k"})
        priming = await anext(call.events())
        while not (tmp_path / "k.waiting").exists():  # noqa: ASYNC110 (the tool makes it)
            await asyncio.sleep(0.01)
        gone = asyncio.create_task(leaving.aclose())
        await asyncio.wait_for(ending.wait(), 10)
        session.path = "/mcp"
        resumed = await session.get(priming.id, base_url=remaining)
        (tmp_path / "k").touch()
        (answer,) = await asyncio.wait_for(resumed.messages(), 10)
        await gone
    assert answer["result"]["content"][0]["text"] == "waited for k"


# --- names ------------------------------------------------------------------------------------------------------------


async def test_a_session_of_another_server_on_the_same_database_is_unknown(migrated_once: str) -> None:
    async with (
        serving(durable(http_app(mcpserver("one")), migrated_once)) as one,
        serving(durable(http_app(fastmcp("two")), migrated_once)) as two,
    ):
        session = await Session.initialize(one)
        priming = await anext((await session.call("echo", {"text": "x"})).events())
        unknown = Session(two)
        unknown.session_id, unknown.version = "0" * 32, session.version
        answers = [
            [
                (response.status, response.headers | {"date": ""}, await response.read())
                for response in (
                    await asking.call("echo", {"text": "x"}, id=1, base_url=two),
                    await asking.get(base_url=two),
                    await asking.get(priming.id, base_url=two),
                    await asking.delete(base_url=two),
                )
            ]
            for asking in (session, unknown)
        ]
        assert answers[0] == answers[1]
        assert {status for status, _, _ in answers[0]} == {404}
        assert await session.call_result("echo", {"text": "still here"}) == "still here"


async def test_servers_of_one_name_share_their_sessions(migrated_once: str) -> None:
    async with (
        serving(durable(http_app(mcpserver("one")), migrated_once, name="both")) as one,
        serving(durable(http_app(fastmcp("two")), migrated_once, name="both")) as two,
    ):
        session = await Session.initialize(one)
        assert await session.call_result("echo", {"text": "x"}, base_url=two) == "x"


# --- what cannot be made durable --------------------------------------------------------------------------------------


async def test_an_app_that_cannot_be_durable_is_refused_with_a_reason(migrated_once: str) -> None:
    store = PostgresStore(migrated_once)
    for app, reason in (
        (mcpserver().streamable_http_app(stateless_http=True), "stateless"),
        (mcpserver().streamable_http_app(event_store=store), "event store"),
        (durable(mcpserver().streamable_http_app(), store), "durable already"),
        (durable(fastmcp().http_app(), store), "durable already"),
        (mcpserver().sse_app(), "no Streamable HTTP"),
        (fastmcp().http_app(transport="sse"), "no Streamable HTTP"),
        (Starlette(), "no Streamable HTTP"),
        (beside(mcpserver().streamable_http_app(), mcpserver().streamable_http_app()), "2 Streamable HTTP"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            durable(app, store)


@pytest.mark.parametrize(("options", "reason"), [({"stateless_http": True}, "stateless"), ("store", "event store")])
async def test_a_fastmcp_app_that_cannot_be_durable_does_not_start(
    options: Any, reason: str, migrated_once: str, caplog: pytest.LogCaptureFixture
) -> None:
    # FastMCP says what its app is like only when the lifespan runs.
    if options == "store":
        options = {"event_store": PostgresStore(migrated_once)}
    with pytest.raises(RuntimeError, match="did not start"):
        async with serving(durable(fastmcp().http_app(**options), migrated_once)) as url:
            await initialize_status(url)
    assert f"ConfigurationError: {'A' if reason == 'stateless' else 'The app'}" in caplog.text
    assert reason in caplog.text
