"""A session on several workers: restored wherever it is needed, known to nobody else, and what clients may send."""

from __future__ import annotations

import asyncio
import collections
import json
from typing import Any

import pytest

from tests.e2e.conftest import SharedWorkers, StartWorkers
from tests.servers.common import LARGE, PAYLOADS
from tests.support.mcp_http import Session

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("module", ["mcpserver_app", "fastmcp_app"])
@pytest.mark.parametrize("version", ["2025-03-26", "2025-06-18", "2025-11-25"])
async def test_a_session_is_restored_with_version_capabilities_and_client(
    module: str, version: str, shared_workers: SharedWorkers
) -> None:
    workers = await shared_workers(module)
    session = await Session.initialize(
        workers[0].url, version, capabilities={"elicitation": {"form": {}}}, client="the-client"
    )
    here = await session.whoami()
    there = await session.whoami(base_url=workers[1].url)
    assert [here["pid"], there["pid"]] == [worker.pid for worker in workers.members]
    assert there | {"pid": 0} == here | {"pid": 0}
    assert there["protocol_version"] == version
    assert there["client"] == "the-client"
    assert "elicitation" in there["capabilities"]
    assert there["session_id"] == session.session_id
    workers.assert_clean_logs()


async def test_a_session_can_be_used_elsewhere_as_soon_as_its_id_is_known(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    for _ in range(10):
        session = await Session.initialize(workers[0].url, initialized=False)
        assert await session.notify("notifications/initialized", base_url=workers[1].url) == 202
        assert await session.call_result("echo", {"text": "x"}, base_url=workers[1].url) == "x"
    workers.assert_clean_logs()


async def test_clients_before_2025_11_25_get_no_priming_event(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url, "2025-06-18")
    response = await session.call("close_stream", {"n": 1}, progress_token="t")
    events = [event async for event in response.events()]
    assert all(event.data for event in events)
    assert "result" in events[-1].message, "The stream was closed for a client that cannot know why."
    workers.assert_clean_logs()


async def bad_ids(session: Session, foreign: Session) -> dict[str, str]:
    """Event ids that must be refused, by what is wrong with them."""
    response = await foreign.call("echo", {"text": "secret"})
    events = [event async for event in response.events()]
    stream = (events[-1].id or "").rpartition("-")[0]
    return {
        "foreign": f"{stream}-0",
        "foreign beyond its end": f"{stream}-999",
        "unknown": "999999999-1",
        "malformed": "no-event-id-at-all",
        "negative": "-1--1",
        "huge": "9" * 40 + "-" + "9" * 40,
        "empty": "",
        "digits of another script": "\u0661-\u0661".encode().decode("latin-1"),
        "quotes": "1'; DROP TABLE events; --",
    }


async def test_a_bad_last_event_id_is_refused_with_an_error_and_tells_nothing(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session, foreign = [await Session.initialize(workers[0].url) for _ in range(2)]
    bodies: dict[str, Any] = {}
    for kind, event_id in (await bad_ids(session, foreign)).items():
        for worker in workers.members:
            response = await asyncio.wait_for(session.get(event_id, base_url=worker.url), 5)
            assert response.status == 400, (kind, response.status)
            bodies[kind] = (await response.json())["error"]
    assert bodies["foreign"] == bodies["unknown"]
    assert bodies["foreign beyond its end"] == bodies["unknown"]
    assert bodies["malformed"] != bodies["unknown"]
    workers.assert_clean_logs()


async def test_an_unknown_session_and_a_foreign_owners_are_alike(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", options={"owner_header": "x-owner"})
    mine = await Session.initialize(workers[0].url, headers={"X-Owner": "ann"})
    theirs = Session(workers[0].url, headers={"X-Owner": "bob"})
    theirs.version = mine.version
    answers = []
    for theirs.session_id in (mine.session_id, "no-such-session"):
        for worker in workers.members:
            responses = [
                await theirs.call("echo", {"text": "x"}, id=1, base_url=worker.url),
                await theirs.get(base_url=worker.url),
                await theirs.delete(base_url=worker.url),
            ]
            answers += [(response.status, await response.read()) for response in responses]
    assert {status for status, _ in answers} == {404}
    assert answers[:6] == answers[6:]
    assert await mine.call_result("echo", {"text": "x"}, base_url=workers[1].url) == "x"
    workers.assert_clean_logs()


@pytest.mark.parametrize("kind", ["nul", "quotes", "emoji", "sse", "large"])
async def test_odd_results_arrive_as_they_were_live_and_resumed(kind: str, shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    response = await session.call("payload", {"kind": kind})
    events = [event async for event in response.events()]
    assert events[-1].message["result"]["content"][0]["text"] == PAYLOADS[kind]
    replayed = await (await session.get(events[0].id, base_url=workers[1].url)).messages()
    assert replayed == [events[-1].message]
    assert kind != "large" or len(events[-1].data or "") > LARGE
    workers.assert_clean_logs()


async def test_a_lone_surrogate_is_an_error_of_its_call_alone(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    answer = await asyncio.wait_for((await session.call("payload", {"kind": "surrogate"}, id=5)).result(), 5)
    assert answer["id"] == 5
    assert "error" in answer or answer["result"]
    assert await session.call_result("echo", {"text": "still here"}) == "still here"


REQUEST_IDS = [12, "12", 0, -1, 2**53, "_GET_stream", "it's \"quoted\" \\ 'id'", "x" * 10_000, "", "ä\u2028", "1_2"]


async def test_any_request_id_comes_back_verbatim(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    for request_id in REQUEST_IDS:
        message = {"jsonrpc": "2.0", "id": request_id, "method": "ping"}
        response = await session.post(message, base_url=workers[1].url)
        if response.status == 200:
            answer = await response.result()
            assert answer["id"] == request_id and type(answer["id"]) is type(request_id), answer
        else:
            assert response.status == 400 and "error" in await response.json(), request_id
    workers.assert_clean_logs()


async def test_an_id_in_flight_is_refused_and_may_be_used_again_after_its_end(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    running = await session.call("wait", {"key": "k"}, id=12)
    await workers.wait_for("k")
    for worker in workers.members:
        for request_id in (12, "12"):
            refused = await session.call("echo", {"text": "x"}, id=request_id, base_url=worker.url)
            assert refused.status == 409, request_id
            assert "error" in await refused.json()
    workers.release("k")
    assert (await running.result())["id"] == 12
    again = await (await session.call("echo", {"text": "x"}, id=12, base_url=workers[1].url)).result()
    assert again["result"]["content"][0]["text"] == "x"
    workers.assert_clean_logs()


async def test_the_standalone_stream_gets_what_any_worker_sends(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    listening = await session.get(base_url=workers[1].url)
    assert listening.status == 200
    for worker in workers.members:
        await session.call_result("announce", {"n": 3}, base_url=worker.url)
    entries = []
    async with asyncio.timeout(5):
        async for event in listening.events():
            if event.data:
                entries.append(event.message["params"]["data"])
            if len(entries) == 6:
                break
    assert [(entry["index"], entry["pid"]) for entry in entries] == [
        (index, worker.pid) for worker in workers.members for index in range(3)
    ]
    workers.assert_clean_logs()


async def test_a_newer_standalone_stream_ends_the_older_and_resumes_it(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    first = await session.get(base_url=workers[0].url)
    await session.call_result("announce", {"n": 2})
    async with asyncio.timeout(5):
        async for event in first.events():
            if event.data:
                break
    second = await session.get(event.id, base_url=workers[1].url)
    assert await asyncio.wait_for(first.drain(), 1)
    await session.call_result("announce", {"n": 1})
    found = []
    async with asyncio.timeout(5):
        async for event in second.events():
            if event.data:
                found.append(event.message["params"]["data"]["index"])
            if len(found) == 2:
                break
    assert found == [1, 0]
    workers.assert_clean_logs()


async def test_a_thousand_calls_in_one_session(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    slots = asyncio.Semaphore(20)

    async def one(number: int) -> None:
        async with slots:
            url = workers[number % 2].url
            assert await session.call_result("echo", {"text": str(number)}, base_url=url) == str(number)

    await asyncio.gather(*(one(number) for number in range(1000)))
    workers.assert_clean_logs()


async def test_a_deleted_session_is_unknown_to_every_worker(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    assert await session.call_result("echo", {"text": "x"}, base_url=workers[1].url) == "x"
    assert (await session.delete(base_url=workers[1].url)).status in (200, 204)
    for worker in workers.members:
        response = await session.call("echo", {"text": "x"}, base_url=worker.url)
        assert response.status == 404, json.dumps(response.headers)
    workers.assert_clean_logs()


async def test_a_session_whose_client_only_listens_goes_on_hearing(start_workers: StartWorkers) -> None:
    workers = await start_workers("mcpserver_app", 1, options={"app": {"session_idle_timeout": 1}})
    session = await Session.initialize(workers[0].url)
    standalone = await session.get()
    assert await session.call_result("keep_telling", {"n": 4, "seconds": 0.8}) == "telling"
    indices = []
    async with asyncio.timeout(15):
        async for event in standalone.events():
            if event.data:
                indices.append(event.message["params"]["data"]["index"])
                if len(indices) == 4:
                    break
    assert indices == [0, 1, 2, 3]
    assert await session.call_result("echo", {"text": "still here"}) == "still here"


async def test_one_id_from_many_connections_at_once_runs_once_at_a_time(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    outcomes: collections.Counter[str] = collections.Counter()

    async def post(text: str) -> None:
        response = await session.call("echo", {"text": text}, id=7)
        if response.status != 200:
            outcomes[str(response.status)] += 1
            return
        async with asyncio.timeout(10):
            result = await response.result()
        outcomes["mine" if result["result"]["content"][0]["text"] == text else "another's"] += 1

    async def connection(number: int) -> None:
        for turn in range(25):
            await post(f"{number}-{turn}")

    await asyncio.gather(*(connection(number) for number in range(12)))
    assert set(outcomes) == {"mine", "409"}, outcomes
    workers.assert_clean_logs()
