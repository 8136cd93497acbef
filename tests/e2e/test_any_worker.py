"""What a client sends reaches whoever it is for, whichever worker takes it (invariants 6 and 8)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator

import pytest

from tests.e2e.conftest import SharedWorkers
from tests.support.mcp_http import Response, Session
from tests.support.sse import Event

pytestmark = pytest.mark.anyio

ELICITS = {"elicitation": {}}


async def asked(response: Response) -> tuple[AsyncIterator[Event], Event]:
    """The stream of a call, up to the question that it asks its client."""
    events = response.events()
    async for event in events:
        if event.data and event.message.get("method") == "elicitation/create":
            return events, event
    raise AssertionError("The call asked nothing.")


async def last(events: AsyncIterator[Event]) -> Event:
    async with asyncio.timeout(10):
        everything = [event async for event in events]
    return everything[-1]


@pytest.mark.parametrize("module", ["mcpserver_app", "fastmcp_app"])
async def test_an_answer_reaches_the_worker_that_asked(module: str, shared_workers: SharedWorkers) -> None:
    workers = await shared_workers(module)
    session = await Session.initialize(workers[0].url, capabilities=ELICITS)
    for asker, answered_at in ((0, 1), (1, 0), (0, 0)):
        response = await session.call("ask", {"question": "well?"}, base_url=workers[asker].url)
        events, question = await asked(response)
        result = {"action": "accept", "content": {"answer": "yes"}}
        assert await session.answer(question.message["id"], result, base_url=workers[answered_at].url) == 202
        final = (await last(events)).message
        text = json.loads(final["result"]["content"][0]["text"])
        assert text["content"] == {"answer": "yes"}
        assert text["pid"] == workers[asker].pid
    workers.assert_clean_logs()


async def test_ids_of_questions_are_unique_in_the_session_and_no_integers(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url, capabilities=ELICITS)
    responses = [await session.call("ask", {"question": "?"}, base_url=workers[n % 2].url) for n in range(6)]
    questions = [await asked(response) for response in responses]
    ids = [question.message["id"] for _, question in questions]
    assert len(set(ids)) == 6
    for given in ids:
        with pytest.raises(ValueError, match="invalid literal"):
            int(given)
    # Each answer goes to its own question, all of them through one worker and in another order.
    for index, (_, question) in reversed(list(enumerate(questions))):
        result = {"action": "accept", "content": {"answer": str(index)}}
        assert await session.answer(question.message["id"], result, base_url=workers[1].url) == 202
    for index, (events, _) in enumerate(questions):
        text = json.loads((await last(events)).message["result"]["content"][0]["text"])
        assert text["content"] == {"answer": str(index)}


async def test_an_answer_from_another_session_reaches_nobody(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url, capabilities=ELICITS)
    stranger = await Session.initialize(workers[1].url, capabilities=ELICITS)
    events, question = await asked(await session.call("ask", {"question": "?"}))
    stolen = {"action": "accept", "content": {"answer": "stolen"}}
    for worker in (0, 1):
        assert await stranger.answer(question.message["id"], stolen, base_url=workers[worker].url) == 202
    honest = {"action": "accept", "content": {"answer": "honest"}}
    assert await session.answer(question.message["id"], honest, base_url=workers[1].url) == 202
    text = json.loads((await last(events)).message["result"]["content"][0]["text"])
    assert text["content"] == {"answer": "honest"}


@pytest.mark.parametrize("given", ["w1.1.1", "w99999.1.1", "w1.99999.1", "1", 1, "nobody", "w-1.x", "\u0000", ""])
async def test_an_answer_to_nobody_is_accepted_and_harms_nothing(given: object, shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    for worker in (0, 1):
        assert await session.answer(given, {}, base_url=workers[worker].url) == 202
    assert await session.call_result("echo", {"text": "well"}, base_url=workers[1].url) == "well"
    workers.assert_clean_logs()


@pytest.mark.parametrize("through", [0, 1])
async def test_a_cancellation_reaches_the_call_wherever_it_runs(through: int, shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    response = await session.call("wait", {"key": "never"}, progress_token="t", id=7)
    await workers.wait_for("never")
    cancelled = {"requestId": 7, "reason": "changed my mind"}
    assert await session.notify("notifications/cancelled", cancelled, base_url=workers[through].url) == 202
    final = (await last(response.events())).message
    assert final["id"] == 7
    assert final["error"]["code"] == -32800
    # The id is free again.
    again = await session.call("echo", {"text": "again"}, id=7, base_url=workers[1].url)
    assert (await again.result())["result"]["content"][0]["text"] == "again"
    workers.assert_clean_logs()


async def test_delete_on_another_worker_ends_calls_and_connections_at_once(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    calls = [await session.call("wait", {"key": f"d{n}"}, id=f"d{n}", base_url=workers[n].url) for n in (0, 1)]
    for n in (0, 1):
        await workers.wait_for(f"d{n}")
    standalone = await session.get(base_url=workers[0].url)
    assert (await session.delete(base_url=workers[1].url)).status == 200
    for worker in workers.members:
        for response in (
            await session.call("echo", {"text": "x"}, base_url=worker.url),
            await session.get(base_url=worker.url),
            await session.delete(base_url=worker.url),
        ):
            assert response.status == 404
    for n, call in enumerate(calls):
        final = (await asyncio.wait_for(last(call.events()), 2)).message
        assert final["id"] == f"d{n}"
        assert final["error"]["data"] == {"reason": "session_ended"}
    assert await asyncio.wait_for(standalone.drain(), 2), "The standalone stream was cut, not ended."
    workers.assert_clean_logs()


async def test_deleting_a_session_cancels_its_tools(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    await session.call("note_cancellation", {"key": "noted"})
    await workers.wait_for("noted")
    assert (await session.delete(base_url=workers[1].url)).status == 200
    async with asyncio.timeout(2):
        while not (workers.directory / "noted.cancelled").exists():  # noqa: ASYNC110 (made by another process)
            await asyncio.sleep(0.01)


async def test_a_call_in_flight_elsewhere_makes_its_id_taken(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    await session.call("wait", {"key": "taken"}, id="12")
    await workers.wait_for("taken")
    for worker in workers.members:
        for same in ("12", 12, " 12", "1_2"):
            refused = await session.call("echo", {"text": "x"}, id=same, base_url=worker.url)
            assert refused.status == 409, same
    workers.release("taken")


async def test_log_level_and_subscriptions_follow_the_session(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("lowlevel_app")
    session = await Session.initialize(workers[0].url)
    await (await session.request("logging/setLevel", {"level": "warning"})).result()
    for uri in ("test://a", "test://b"):
        await (await session.request("resources/subscribe", {"uri": uri})).result()
    await (await session.request("resources/unsubscribe", {"uri": "test://a"})).result()
    told = json.loads(await session.call_result("told", base_url=workers[1].url))
    assert told == {"level": "warning", "subscriptions": ["test://b"]}


async def test_what_a_client_tells_one_worker_the_others_learn_that_know_its_session(
    shared_workers: SharedWorkers,
) -> None:
    workers = await shared_workers("lowlevel_app")
    session = await Session.initialize(workers[0].url)

    async def told(worker: int) -> object:
        return json.loads(await session.call_result("told", base_url=workers[worker].url))

    assert await told(1) == {"level": None, "subscriptions": []}
    for worker, method, params, known in (
        (0, "logging/setLevel", {"level": "error"}, {"level": "error", "subscriptions": []}),
        (0, "resources/subscribe", {"uri": "test://x"}, {"level": "error", "subscriptions": ["test://x"]}),
        (1, "resources/unsubscribe", {"uri": "test://x"}, {"level": "error", "subscriptions": []}),
    ):
        answer = await (await session.request(method, params, base_url=workers[worker].url)).result()
        assert "result" in answer
        assert await told(1 - worker) == known
        assert await told(worker) == known
    workers.assert_clean_logs()


async def test_a_second_initialize_is_what_other_workers_then_know(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url, capabilities=ELICITS, client="first")
    assert (await session.whoami(base_url=workers[1].url))["client"] == "first"
    params = {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "second", "version": "0"},
    }
    again = await session.request("initialize", params)
    assert again.status == 200
    assert (await again.result())["result"]["protocolVersion"] == "2025-06-18"
    session.version = "2025-06-18"
    # Also on one that knew the first.
    for worker in workers.members:
        who = await session.whoami(base_url=worker.url)
        assert (who["client"], who["protocol_version"]) == ("second", "2025-06-18")


async def test_a_tool_closes_connections_wherever_they_are_attached(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("mcpserver_app")
    session = await Session.initialize(workers[0].url)
    standalone = await session.get(base_url=workers[1].url)
    first = await anext(standalone.events())
    assert await session.call_result("close_standalone", {}, base_url=workers[0].url) == "closed"
    assert await asyncio.wait_for(standalone.drain(), 2), "The standalone stream was cut, not ended."
    assert re.fullmatch(r"\d+-\d+", first.id or "")
