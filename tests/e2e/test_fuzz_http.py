"""Whatever comes over HTTP gets a 2xx or a 4xx, breaks nothing, and leaves a session beside it alone.

Hypothesis makes up the requests: the same ones in each run, or others with FUZZ_SEED, and more of them with
FUZZ_EXAMPLES. A failure prints the few requests that were under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.e2e.conftest import SharedWorkers
from tests.support.mcp_http import ConnectionCut, Response, Session, request
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio

SEED = os.environ.get("FUZZ_SEED")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES") or 200)
ALLOWED = [r"(Invalid|Missing) (Host|Origin) header", "Invalid HTTP request received", "upgrade request", "dropped '"]
"""What the SDK and uvicorn say of odd requests."""

PATIENCE = 0.03
"""How long an event stream that does not end by itself is read, in seconds."""


@dataclass(frozen=True, slots=True)
class Made:
    """One request. `session`, `resume` name what a running test has: one of its sessions, one of its event ids."""

    method: str
    headers: dict[str, str]
    body: bytes | None
    session: str | None
    resume: str | None
    worker: int


# --- requests ---------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec="utf-8"), max_size=20) | st.sampled_from(
    ["\0", "1_2", "w1.1.1", "_GET_stream", "x" * 9000]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)

made_up = st.builds(lambda worker, part: f"w{worker}.{part}.1", st.integers(0, 3) | st.just(2**63), st.integers(0, 3))
ids = st.integers(-3, 3) | st.sampled_from(["1", "", "\0"]) | made_up | values
tools = st.sampled_from(
    ["echo", "count", "log", "announce", "payload", "whoami", "close_stream", "close_standalone", "ask", "nope"]
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": values,
        "n": st.integers(-1, 5) | values,
        "seconds": st.just(0) | values,
        "kind": st.sampled_from(["nul", "quotes", "sse", "surrogate"]) | values,
        "question": texts | values,
    },
)
calls = st.fixed_dictionaries(
    {"name": tools | values, "arguments": arguments | values},
    optional={"_meta": st.fixed_dictionaries({"progressToken": ids}) | values},
)
named = st.fixed_dictionaries(
    {},
    optional={
        "requestId": ids,
        "progressToken": ids,
        "progress": values,
        "level": texts,
        "uri": texts,
        "cursor": values,
        "_meta": values,
    },
)
handshakes = st.fixed_dictionaries(
    {
        "protocolVersion": st.sampled_from(["2024-11-05", "2025-11-25", "2026-07-28", "x"]) | values,
        "capabilities": st.just({}) | values,
        "clientInfo": st.just({"name": "fuzz", "version": "1"}) | values,
    }
)
methods = st.sampled_from(
    [
        "tools/call",
        "tools/list",
        "ping",
        "initialize",
        "logging/setLevel",
        "resources/subscribe",
        "resources/unsubscribe",
        "resources/read",
        "prompts/get",
        "completion/complete",
        "notifications/initialized",
        "notifications/cancelled",
        "notifications/progress",
        "notifications/roots/list_changed",
    ]
)
messages = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0")},
    optional={
        "id": ids,
        "method": methods | values,
        "params": calls | named | handshakes | values,
        "result": values,
        "error": values,
    },
)


def written(value: Any) -> bytes:
    """As JSON, which Python writes with NaN where there is one."""
    return json.dumps(value).encode()


requests_of_tools = st.builds(
    lambda id, params: {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params}, ids, calls
)
answers = st.builds(lambda id, result: {"jsonrpc": "2.0", "id": id, "result": result}, ids, st.just({}) | values)
notices = st.builds(
    lambda method, params: {"jsonrpc": "2.0", "method": method, "params": params},
    st.sampled_from(["notifications/cancelled", "notifications/progress", "notifications/roots/list_changed"]),
    named,
)
bodies = st.one_of(
    requests_of_tools.map(written),
    (answers | notices).map(written),
    (answers | notices | requests_of_tools).map(written),
    messages.map(written),
    st.lists(messages, max_size=3).map(written),
    values.map(written),
    st.binary(max_size=50),
    st.builds(
        lambda body, at, odd: body[:at] + odd + body[at:],
        messages.map(written),
        st.integers(0, 60),
        st.binary(max_size=4),
    ),
)

# What may stand in a header: bytes but CR, LF and NUL, which end it.
latin = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=30)
headers = st.fixed_dictionaries(
    {},
    optional={
        "Accept": st.sampled_from(["*/*", "application/json", "text/event-stream", "text/*, application/*;q=0"])
        | latin,
        "Content-Type": st.sampled_from(["application/json", "Application/JSON;x", "text/plain", "application/jsonx"])
        | latin,
        "MCP-Protocol-Version": st.sampled_from(["2025-06-18", "2025-11-25", "2026-07-28", "2027-01-01"]) | latin,
        "Mcp-Method": methods | latin,
        "Mcp-Name": latin,
        "Authorization": latin,
        "Origin": st.sampled_from(["http://127.0.0.1:1", "null"]) | latin,
        "Host": st.sampled_from(["127.0.0.1:1", "evil.test"]) | latin,
        "Connection": st.sampled_from(["close", "upgrade", "keep-alive"]) | latin,
        "Upgrade": st.just("h2c"),  # a WebSocket never gets to the app
        "Expect": st.just("100-continue"),
        "X-Odd": latin,
    },
)
# Most requests get as far as a session that is there.
verbs = st.sampled_from(["POST"] * 20 + ["GET"] * 4 + ["DELETE", "PUT", "HEAD", "OPTIONS", "PATCH", "TRACE"])
sessions = st.one_of(*[st.sampled_from(["own", "own", "own", "other", "deleted", "unknown"])] * 3, latin, st.none())
cursors = st.sampled_from(["own", "other", "1-1", "0-0", f"{2**63}-1", "-"]) | latin | st.none()
made = st.builds(
    Made, verbs, st.just({}) | headers, bodies | st.none(), sessions, st.none() | cursors, st.integers(0, 1)
)


# --- sending them -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Beside:
    """What a run of the test has: the workers, sessions to aim at, and the one that is to be left alone."""

    workers: Workers
    healthy: Session
    targets: dict[str, str]
    cursors: dict[str, str]
    turns: itertools.count[int]


async def target(workers: Workers, worker: int) -> tuple[Session, str]:
    """A session to aim at, and the id of an event in it."""
    session = await Session.initialize(workers[worker].url, capabilities={"elicitation": {}})
    events = [event async for event in (await session.call("echo", {"text": "x"})).events()]
    return session, events[0].id or ""


@pytest.fixture(scope="module")
async def beside(running_workers: SharedWorkers) -> AsyncIterator[Beside]:
    workers = await running_workers("mcpserver_app")
    workers.forget()
    own, others, gone = [await target(workers, number % 2) for number in range(3)]
    await gone[0].delete()
    healthy = await Session.initialize(workers[0].url)
    call = await healthy.call("wait", {"key": "fuzz"}, progress_token="p", id="waiting")
    await workers.wait_for("fuzz")
    targets = {"own": own[0], "other": others[0], "deleted": gone[0]}
    yield Beside(
        workers,
        healthy,
        {name: session.session_id or "" for name, session in targets.items()} | {"unknown": "0" * 32},
        {"own": own[1], "other": others[1]},
        itertools.count(),
    )
    # The call that ran all the time comes to its end, with its connection never cut.
    workers.release("fuzz")
    messages = await call.messages()
    assert [message.get("method") for message in messages[:-1]] == ["notifications/progress"] * 2
    assert messages[-1]["result"]["content"][0]["text"] == "waited for fuzz"
    workers.assert_clean_logs(*ALLOWED)


async def answered(beside: Beside, given: Made) -> int | str:
    """Send the request, read its response for a while, and leave; its status, or what came in the place of one."""
    headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-11-25", **given.headers}
    if given.session is not None:
        headers["Mcp-Session-Id"] = beside.targets.get(given.session, given.session)
    if given.resume is not None:
        headers["Last-Event-ID"] = beside.cursors.get(given.resume, given.resume)
    url = f"{beside.workers[given.worker].url}/mcp"
    try:
        async with asyncio.timeout(10):
            response = await request(given.method, url, headers=headers, body=given.body)
            while response.status == 100:
                await response.read_head()
    except (TimeoutError, ConnectionCut) as error:
        return repr(error)
    if given.method != "HEAD":
        await read_for_a_while(response)
    response.cut()
    return response.status


async def read_for_a_while(response: Response) -> None:
    with contextlib.suppress(TimeoutError, ConnectionCut):
        async with asyncio.timeout(PATIENCE):
            await response.read()


@settings(
    max_examples=EXAMPLES,
    derandomize=SEED is None,
    phases=[Phase.generate],  # shrinking against live workers takes longer than reading six requests
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@seed(int(SEED or 0))
@given(requests=st.lists(made, min_size=1, max_size=6))
async def test_any_request_gets_a_2xx_or_a_4xx_and_disturbs_nobody(beside: Beside, requests: list[Made]) -> None:
    turn = next(beside.turns)
    healthy = beside.healthy.call_result("echo", {"text": str(turn)}, base_url=beside.workers[turn % 2].url)
    text, *statuses = await asyncio.gather(healthy, *(answered(beside, given) for given in requests))
    assert text == str(turn)
    for given_request, status in zip(requests, statuses, strict=True):
        assert isinstance(status, int) and 200 <= status < 500, (status, given_request)
