"""Odd bodies and headers are answered as the SDK answers them, or refused; never with a 5xx or a traceback.

Each goes to a pair of durable workers, and for comparison to the same server as the SDK left it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.e2e.conftest import SharedWorkers
from tests.integration.apps import initialize_message, mcpserver
from tests.support.mcp_http import Session, request
from tests.support.serving import serving

pytestmark = pytest.mark.anyio

PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
NUL = "\0"


def ping(**changes: Any) -> dict[str, Any]:
    return PING | changes


def raw(given: str, rest: str = '"method":"ping"') -> bytes:
    """A request whose id is written as given."""
    return f'{{"jsonrpc":"2.0","id":{given},{rest}}}'.encode()


def notice(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "method": method, "params": params}


BODIES: dict[str, Any] = {
    "empty": b"",
    "NUL": b"\0",
    "no UTF-8": b'{"jsonrpc":"2.0","id":1,"method":"\xff\xfe"}',
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(PING).encode(),
    "UTF-16": json.dumps(PING).encode("utf-16"),
    "trailing": json.dumps(PING).encode() + b"x",
    "Python": b"{'jsonrpc': '2.0'}",
    "batch": [PING, PING],
    "empty batch": [],
    "string": "x",
    "number": 1,
    "null": b"null",
    "empty object": {},
    "deep list": b"[" * 100_000 + b"]" * 100_000,
    "deep params": b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"_meta":{"a":'
    + b"[" * 150
    + b"]" * 150
    + b"}}}",
    "too deep params": raw("1", '"method":"ping","params":{"a":' + "[" * 9000 + "]" * 9000 + "}"),
    "many keys": ping(params={"_meta": {str(n): n for n in range(50_000)}}),
    "duplicate keys": b'{"jsonrpc":"2.0","id":1,"id":2,"method":"nope","method":"ping"}',
    "lone surrogate in the id": raw(r'"\ud800"'),
    "lone surrogate in the method": raw("1", r'"method":"\udfff"'),
    "lone surrogate in a key": raw("1", r'"method":"ping","params":{"\ud800":1}'),
    "surrogate pair": raw(r'"\ud83d\ude00"'),
    "NUL in the id": ping(id=NUL),
    "NUL in the method": ping(method=f"pi{NUL}ng"),
    "NUL in params": ping(params={"_meta": {NUL: NUL}}),
    "NaN in params": raw("1", '"method":"ping","params":{"_meta":{"a":NaN,"b":-Infinity}}'),
    "huge float": raw("1", '"method":"ping","params":{"_meta":{"a":1e999}}'),
    "big id": raw("9" * 4000),
    "too big id": raw("9" * 5000),
    "id of 2^63": raw(str(2**63)),
    "digits as id": ping(id="9" * 5000),
    "long id": ping(id="x" * 100_000),
    "long method": ping(method="x" * 100_000),
    "wrong version": ping(jsonrpc="1.0"),
    "version as a number": ping(jsonrpc=2.0),
    "no version": {"id": 1, "method": "ping"},
    "no method": {"jsonrpc": "2.0", "id": 1},
    "method as a number": ping(method=1),
    "params as a list": ping(params=[1]),
    "params as a string": ping(params="x"),
    "meta as a string": ping(params={"_meta": "x"}),
    "token as a list": ping(params={"_meta": {"progressToken": [1]}}),
    "unknown member": ping(unknown=1),
    "request and result": ping(result={}),
    "result and error": {"jsonrpc": "2.0", "id": 1, "result": {}, "error": {"code": 1, "message": "x"}},
    "result without id": {"jsonrpc": "2.0", "id": None, "result": {}},
    "error without id": {"jsonrpc": "2.0", "id": None, "error": {"code": 1, "message": "x"}},
    "result for a float": {"jsonrpc": "2.0", "id": 1.5, "result": {}},
    "result for true": {"jsonrpc": "2.0", "id": True, "result": {}},
    "result as a list": {"jsonrpc": "2.0", "id": 1, "result": []},
    "made-up worker": {"jsonrpc": "2.0", "id": f"w{'9' * 20}.1.1", "result": {}},
    "made-up object": {"jsonrpc": "2.0", "id": f"w1.{'9' * 5000}.1", "result": {}},
    "made-up token": notice("notifications/progress", progressToken=f"w{2**63}.1.1", progress=1),
    "worker without number": {"jsonrpc": "2.0", "id": f"w0.0.{NUL}", "result": {}},
    "unknown notification": notice("nope", x=NUL),
    "odd progress": notice("notifications/progress", progressToken={}, progress="x"),
    "odd cancellation": notice("notifications/cancelled", requestId=[1]),
    "cancellation of nothing": notice("notifications/cancelled"),
    "cancellation of NUL": notice("notifications/cancelled", requestId=NUL),
    "cancellation of much": notice("notifications/cancelled", requestId=10**4000),
    "tool as a number": ping(method="tools/call", params={"name": 1}),
    "odd level": ping(method="logging/setLevel", params={"level": NUL}),
    "odd uri": ping(method="resources/subscribe", params={"uri": f"x{NUL}y"}),
    "second handshake without params": ping(method="initialize"),
    "second handshake with odd params": ping(method="initialize", params={"protocolVersion": 1}),
}

NO_IDS = {
    "id null": raw("null"),
    "id true": raw("true"),
    "id float": raw("1.0"),
    "id NaN": raw("NaN"),
    "id infinite": raw("1e400"),
    "id list": raw("[1]"),
    "id object": raw("{}"),
}
"""Requests that the SDK takes for notifications, so that their senders would wait for ever."""

SESSION, VERSION, RESUME = "Mcp-Session-Id", "MCP-Protocol-Version", "Last-Event-ID"
LONG = "x" * 30_000

HEADERS: dict[str, dict[str, str]] = {
    "accepts JSON": {"Accept": "application/json"},
    "accepts SSE": {"Accept": "text/event-stream"},
    "accepts all": {"Accept": "*/*"},
    "accepts nothing": {"Accept": ""},
    "accepts nonsense": {"Accept": "\xff\xfe,;;q=,"},
    "accepts much": {"Accept": "a/b," * 10_000},
    "content like JSON": {"Content-Type": "application/jsonx"},
    "content JSON patch": {"Content-Type": "application/json-patch+json"},
    "content text": {"Content-Type": "text/plain"},
    "content empty": {"Content-Type": ""},
    "content twice": {"Content-Type": "text/plain, application/json"},
    "content with nonsense": {"Content-Type": "application/json;\xff"},
    "content long": {"Content-Type": f"application/json; x={LONG}"},
    "session empty": {SESSION: ""},
    "session not ASCII": {SESSION: "\xe9"},
    "session long": {SESSION: LONG},
    "session twice": {SESSION: f"x\r\n{SESSION}: y"},
    "session with a space": {SESSION: "a b"},
    "session with DEL": {SESSION: "a\x7f"},
    "session with quotes": {SESSION: "'; DROP TABLE sessions; --"},
    "version empty": {VERSION: ""},
    "version unknown": {VERSION: "1999-01-01"},
    "version not ASCII": {VERSION: "\xe9"},
    "version with spaces": {VERSION: " 2025-06-18 "},
    "version old": {VERSION: "2024-11-05"},
    "version twice": {VERSION: f"2025-11-25\r\n{VERSION}: 2026-07-28"},
    "version twice, newer first": {VERSION: f"2026-07-28\r\n{VERSION}: 2025-11-25"},
    "version long": {VERSION: LONG},
    "resumes in a POST": {RESUME: LONG},
    "host foreign": {"Host": "evil.test"},
    "origin foreign": {"Origin": "http://evil.test"},
    "origin null": {"Origin": "null"},
}

CURSORS = {
    "empty": "",
    "long": LONG,
    "not ASCII": "\xe9",
    "digits of another script": "\u0661-\u0661".encode().decode("latin-1"),
    "twice": f"1-1\r\n{RESUME}: 2-2",
    "stream beyond": f"{2**63}-1",
    "number beyond": f"1-{2**63}",
    "both beyond": "9" * 19 + "-" + "9" * 19,
    "zero": "0-0",
    "no stream": "-1",
    "leading zero": "01-1",
    "negative": "1--1",
    "with a space": "1- 1",
    "with DEL": "1-1\x7f",
}

METHODS = ["PUT", "PATCH", "OPTIONS", "TRACE", "CONNECT", "QUERY", "BREW", "get", "x" * 1000]


async def statuses(sessions: list[Session], method: str, body: Any = None, **headers: str) -> list[int]:
    """What each session's server answers."""
    found = []
    for session in sessions:
        response = await request(method, session.url(), headers=session.headers(**headers), body=body)
        async with asyncio.timeout(10):
            await response.read()
        assert response.complete
        found.append(response.status)
    return found


async def test_odd_requests_get_what_the_sdk_gives_them(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    async with serving(mcpserver().streamable_http_app()) as plain:
        sessions = [await Session.initialize(url) for url in (*workers.urls, plain)]
        healthy = await Session.initialize(workers[0].url)

        async def alike(name: str, method: str, body: Any = None, **headers: str) -> None:
            here, there, sdk = await statuses(sessions, method, body, **headers)
            assert here == there == sdk, name
            assert 200 <= here < 500, name

        for name, body in BODIES.items():
            await alike(name, "POST", body)
        for name, changed in HEADERS.items():
            await alike(name, "POST", PING, **changed)
        for method in METHODS:
            await alike(method, method)
        await alike("GET for JSON", "GET", Accept="application/json")
        for session in sessions:
            session.session_id = None
        for name, body in {
            "first handshake without params": ping(method="initialize"),
            "first handshake with odd params": ping(method="initialize", params={"protocolVersion": 1}),
            "handshake as a notification": notice("initialize"),
            "handshake of a version unknown": initialize_message("1999-01-01"),
            "handshake of the other era": initialize_message("2026-07-28"),
            "handshake of NUL": initialize_message(NUL) | {"id": NUL},
            "no handshake": PING,
            "no handshake but a notification": notice("notifications/initialized"),
        }.items():
            await alike(name, "POST", body)
        for method in ("GET", "DELETE"):
            await alike(f"{method} without a session", method)
        assert await healthy.call_result("echo", {"text": "x"}, base_url=workers[1].url) == "x"
    workers.assert_clean_logs(r"Invalid (Host|Origin) header")


async def test_a_request_whose_id_is_none_is_refused_rather_than_left_waiting(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    sessions = [await Session.initialize(url) for url in workers.urls]
    for name, body in NO_IDS.items():
        assert await statuses(sessions, "POST", body) == [400, 400], name
    workers.assert_clean_logs()


async def test_odd_cursors_are_refused(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    sessions = [await Session.initialize(url) for url in workers.urls]
    for name, cursor in CURSORS.items():
        assert await statuses(sessions, "GET", **{RESUME: cursor}) == [400, 400], name
    for session in sessions:
        session.session_id = "0" * 32
    for name, cursor in CURSORS.items():
        assert await statuses(sessions, "GET", **{RESUME: cursor}) == [404, 404], name
    workers.assert_clean_logs()
