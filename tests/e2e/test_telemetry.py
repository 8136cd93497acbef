"""Metrics and traces of real workers under an OpenTelemetry SDK: each that is documented is there, and no other."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from mcp_pg_events.finals import MESSAGES
from mcp_pg_events.telemetry import INSTRUMENTS
from tests.e2e.conftest import StartWorkers
from tests.support.calls import Counting
from tests.support.log import drop_partitions, query
from tests.support.mcp_http import Session, request
from tests.support.until import until
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio

TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CLIENT}-01"


async def collected(url: str) -> dict[str, Any]:
    result: dict[str, Any] = await (await request("GET", url + "/telemetry")).json()
    return result


async def ask(method: str, url: str) -> None:
    response = await request(method, url)
    assert response.status == 200, await response.read()
    await response.read()


class Figures:
    """What some collections have recorded together."""

    def __init__(self, *collections: dict[str, Any]) -> None:
        self.points = [point for collection in collections for point in collection["metrics"]]
        self.spans = [span for collection in collections for span in collection["spans"]]

    def value(self, name: str, **attributes: str) -> float:
        """The sum of a metric's points whose attributes end as given."""
        return sum(value for _, _, _, found, value, _ in self._of(name, attributes))

    def count(self, name: str) -> int:
        """How often a histogram was recorded to."""
        return sum(count for *_, count in self._of(name, {}))

    def _of(self, name: str, attributes: dict[str, str]) -> list[Any]:
        named = [point for point in self.points if point[0] == f"mcp_pg_events.{name}"]
        return [point for point in named if set(attributes.values()) <= set(point[3].values())]

    def names(self) -> set[str]:
        return {span["name"] for span in self.spans}


async def resumed(session: Session, last_event_id: str, url: str, status: int) -> None:
    response = await session.get(last_event_id, base_url=url)
    assert response.status == status
    await response.read()


async def everything(workers: Workers, dsn: str) -> tuple[Figures, set[str]]:
    """All that is recorded anywhere, on two workers of which the first is killed; and the ids of the sessions."""
    here, there = workers[0].url, workers[1].url
    session = await Session.initialize(here)
    # Emitted here, read there.
    call = await Counting.start(session, n=20, seconds=1)
    cursor = call.cut()

    async def missed() -> bool:
        return bool(query(dsn, "SELECT max(seq) >= 10 FROM events")[0][0])

    await until(missed)
    await call.resumed(await session.get(cursor, base_url=there))
    busy = Figures(await collected(here), await collected(there))
    assert (busy.value("call.count"), busy.value("reader.count"), busy.value("session.count")) == (1, 1, 1)
    await call.finished()
    await resumed(session, call.cursor, there, 204)
    await resumed(session, "no-such-id", there, 400)
    await resumed(session, "999999-1", there, 400)
    # A call whose session is deleted, one whose worker dies.
    await session.call("wait", {"key": "deleted"}, id="deleted")
    await workers.wait_for("deleted")
    assert (await session.delete()).status == 200
    other = await Session.initialize(here)
    lost = await other.call("wait", {"key": "lost"}, id="lost")
    await workers.wait_for("lost")
    before = await collected(here)
    await workers[0].kill()
    lost.close()

    async def reaped() -> bool:
        return Figures(await collected(there)).value("reaped.calls", reason="worker_lost") == 1

    await until(reaped, timeout=30)
    # Its events go, as with retention.
    third = await Session.initialize(there)
    await third.call_result("echo", {"text": "x"})
    last = query(dsn, "SELECT max(number) FROM streams WHERE request_key IS NOT NULL")[0][0]
    events = query(dsn, "SELECT count(*) FROM events")[0][0]
    drop_partitions(dsn)
    query(dsn, "UPDATE streams SET floor = final_seq WHERE number = %s", last)
    await resumed(third, f"{last}-0", there, 400)
    await ask("POST", there + "/retention")
    await ask("POST", there + "/drain")
    figures = Figures(before, await collected(there))
    # The error of the call that was reaped, and of the one whose session ended, are written by the database.
    assert figures.value("append.events") == events - 2
    ids = {each.session_id for each in (session, other, third)}
    return figures, {each for each in ids if each}


async def test_every_documented_metric_and_span_is_recorded_and_no_other(
    start_workers: StartWorkers, migrated: str
) -> None:
    workers = await start_workers("observed_app", 2)
    figures, sessions = await everything(workers, migrated)

    recorded = {(name, kind, unit) for name, unit, kind, *_ in figures.points}
    assert recorded == {(each.name, each.kind, each.unit) for each in INSTRUMENTS}
    for each in INSTRUMENTS:
        points = [point for point in figures.points if point[0] == each.name]
        assert {tuple(attributes) for _, _, _, attributes, *_ in points} == {each.attributes}, each.name

    for outcome in ("resumed", "complete", "malformed", "unknown", "expired"):
        assert figures.value("resume.requests", outcome=outcome) == 1, outcome
    assert figures.value("reaped.calls") == 2
    assert figures.value("reaped.calls", reason="session_ended") == 1
    assert {attributes["error.type"] for name, _, _, attributes, *_ in figures.points if "reaped" in name} <= set(
        MESSAGES
    )
    assert figures.value("append.batch.size") == figures.value("append.events")
    assert figures.count("append.batch.size") == figures.count("append.duration") > 0
    assert figures.value("wake.notifications") > 0
    assert 0 < figures.value("delivery.duration") / figures.count("delivery.duration") < 1
    assert figures.count("replay.size") == 1
    assert 9 <= figures.value("replay.size") <= 20
    assert figures.value("retention.partitions", result="dropped") == 2
    assert figures.value("retention.rows", table="sessions") == 3

    own = {span["name"] for span in figures.spans if span["scope"] == "mcp_pg_events"}
    spans = {f"mcp_pg_events.{name}" for name in ("replay", "reap", "drain", "retention")}
    assert own == {"POST", "GET", "DELETE"} | spans
    [replay] = [span for span in figures.spans if span["name"] == "mcp_pg_events.replay"]
    assert replay["attributes"] == {"mcp_pg_events.replay.events": figures.value("replay.size")}
    assert not [session for session in sessions if session in json.dumps([figures.points, figures.spans])]


async def trace_of(url: str, session: Session, id: str, **headers: str) -> list[dict[str, Any]]:
    """The spans of one call of `echo`, and of its client."""
    params: dict[str, Any] = {"name": "echo", "arguments": {"text": "x"}}
    if meta := headers.pop("meta", None):
        params["_meta"] = {"traceparent": meta}
    message = {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": params}
    before = {span["id"] for span in (await collected(url))["spans"]}
    await (await session.post(message, headers=headers)).read()

    async def both() -> list[dict[str, Any]]:
        new = [span for span in (await collected(url))["spans"] if span["id"] not in before]
        return new if {"POST", "mcp_pg_events.request"} & {span["name"] for span in new} else []

    await until(both)
    return await both()


async def test_a_request_goes_on_with_its_clients_trace_and_has_one_server_span(start_workers: StartWorkers) -> None:
    workers = await start_workers("observed_app", 1)
    url = workers[0].url
    session = await Session.initialize(url)

    def told(spans: list[dict[str, Any]]) -> dict[str, tuple[str, str, str | None]]:
        assert len(spans) == len({span["name"] for span in spans})
        return {span["name"]: (span["kind"], span["trace"], span["parent"]) for span in spans}

    spans = await trace_of(url, session, "header", traceparent=TRACEPARENT)
    [ours] = [span for span in spans if span["name"] == "POST"]
    assert told(spans) == {"POST": ("server", TRACE, CLIENT), "tools/call echo": ("server", TRACE, ours["id"])}
    assert ours["attributes"] == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "url.path": "/mcp",
        "url.scheme": "http",
    }

    spans = await trace_of(url, session, "meta", meta=TRACEPARENT)
    assert told(spans) == {"POST": ("server", TRACE, CLIENT), "tools/call echo": ("server", TRACE, CLIENT)}

    spans = await trace_of(url, session, "none")
    [ours] = [span for span in spans if span["name"] == "POST"]
    assert told(spans) == {
        "POST": ("server", ours["trace"], None),
        "tools/call echo": ("server", ours["trace"], ours["id"]),
    }
    assert ours["trace"] != TRACE

    spans = await trace_of(url, session, "instrumented", **{"x-instrumented": "1", "traceparent": TRACEPARENT})
    by_name = {span["name"]: span for span in spans}
    assert by_name["mcp_pg_events.request"]["kind"] == "internal"
    assert by_name["mcp_pg_events.request"]["parent"] == by_name["instrumented"]["id"]
    assert by_name["tools/call echo"]["parent"] == by_name["mcp_pg_events.request"]["id"]

    for broken in ("00-nonsense-01", f"00-{'0' * 32}-{CLIENT}-01"):
        spans = await trace_of(url, session, f"broken {broken}", traceparent=broken, meta=broken)
        assert told(spans)["POST"][2] is None
    workers.assert_clean_logs()


async def test_a_refusal_is_no_error_and_an_outage_is(start_workers: StartWorkers, migrated: str) -> None:
    workers = await start_workers("observed_app", 1)
    url = workers[0].url
    session = await Session.initialize(url)
    unknown = Session(url)
    unknown.session_id = "unknown"
    assert (await unknown.call("echo", {"text": "x"})).status == 404
    with psycopg.connect(migrated, autocommit=True) as connection:
        connection.execute("ALTER TABLE mcp_events.streams RENAME TO elsewhere")
        assert (await session.call("echo", {"text": "x"})).status == 500
        connection.execute("ALTER TABLE mcp_events.elsewhere RENAME TO streams")

    async def both() -> list[Any]:
        spans = (await collected(url))["spans"]
        found = {span["attributes"].get("http.response.status_code"): span for span in spans if span["name"] == "POST"}
        return [found[404], found[500]] if {404, 500} <= set(found) else []

    await until(both)
    refused, failed = await both()
    assert (refused["status"], refused["attributes"].get("error.type")) == ("unset", None)
    assert (failed["status"], failed["attributes"].get("error.type")) == ("error", "500")
