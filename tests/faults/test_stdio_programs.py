"""Programs on stdio that misbehave or die behind the proxy: every call has its end, and no program is left."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import pytest

from tests.e2e.conftest import SharedWorkers, StartWorkers
from tests.faults.test_death import rows
from tests.support.mcp_http import Session, request
from tests.support.processes import gone
from tests.support.programs import HEADERS, INITIALIZE, cursor_of, pid_of, program, reason_of, waiting_call
from tests.support.until import until
from tests.support.workers import Workers

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("manner", "text"),
    [("dies", "ended with exit code 7 before it had answered"), ("silent", "did not answer within 1 seconds")],
)
async def test_a_program_that_does_not_come_up_is_an_error_of_initialize(
    manner: str, text: str, migrated: str, start_workers: StartWorkers
) -> None:
    workers = await start_workers("stdio_app", 1, options=program(manner, start_timeout=1.0, max_processes=1))
    for number in range(2):  # with room for one, the first has to be gone
        response = await request("POST", workers[0].url + "/mcp", headers=HEADERS, body=INITIALIZE | {"id": number})
        assert response.status == 200
        assert "mcp-session-id" not in response.headers
        answer = await response.json()
        assert (answer["id"], answer["error"]["data"]) == (number, {"reason": "process_lost"})
        assert text in answer["error"]["message"]
        started = workers[0].output().split("stderr: program ")[-1].split()[0]
        await until(lambda pid=int(started): gone(pid))
        await asyncio.sleep(0.2)  # the replica learns of its end a little later
    assert await rows(migrated, "SELECT FROM mcp_events.sessions") == []


async def test_a_program_that_its_client_did_not_wait_for_is_ended(migrated: str, start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 1, options=program("slow"))
    asking = asyncio.create_task(request("POST", workers[0].url + "/mcp", headers=HEADERS, body=INITIALIZE))
    await until(lambda: logged(workers, "stderr: program "))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    pid = int(workers[0].output().split("stderr: program ")[-1].split()[0])
    await until(lambda: gone(pid))
    assert await rows(migrated, "SELECT FROM mcp_events.sessions") == []


async def test_noise_on_the_output_is_ignored_and_never_logged(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 1, options=program("noisy"))
    session = await Session.initialize(workers[0].url)
    assert await session.call_result("garbage") == "written"
    assert await session.call_result("echo", {"text": "on"}) == "on"
    output = workers[0].output()
    assert output.count("what is no MCP message") == 1
    assert "secret" not in output


async def test_a_killed_program_gives_every_open_call_its_error_and_ends_the_session(
    shared_workers: SharedWorkers,
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    other = await Session.initialize(workers[0].url)
    pid = await pid_of(session)
    attached = await waiting_call(workers, session, "here")
    elsewhere = await waiting_call(workers, session, "there", base_url=workers[1].url)
    dropped = await waiting_call(workers, session, "dropped", base_url=workers[1].url)
    cursor = await cursor_of(dropped)
    dropped.cut()
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    assert await reason_of(attached) == "process_lost"
    assert await reason_of(elsewhere) == "process_lost"
    assert time.monotonic() - began < 3
    # Who comes back for his call is told too, though the session is over for everything else.
    assert await reason_of(await session.get(cursor)) == "process_lost"
    for url in workers.urls:
        assert (await session.call("echo", {"text": "x"}, base_url=url)).status == 404
        assert (await session.get(base_url=url)).status == 404
    dsn = workers.environment["MCP_PG_EVENTS_DSN"]
    assert await rows(dsn, "SELECT ended_reason FROM mcp_events.sessions WHERE id = %s", session.session_id) == [
        ("process_lost",)
    ]
    assert await other.call_result("echo", {"text": "on"}, base_url=workers[1].url) == "on"
    workers.assert_clean_logs(f"Session {session.session_id}: its program was ended by SIGKILL")


@pytest.mark.parametrize(("tool", "how"), [("leave", "exit code 3"), ("close_output", "closed its output")])
async def test_a_program_that_is_as_good_as_dead_is_over(tool: str, how: str, shared_workers: SharedWorkers) -> None:
    """One has gone and left a child that holds its output open; the other lives, and can never answer again."""
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    pids = [await pid_of(session)]
    if tool == "leave":
        pids.append(int(await session.call_result("child")))
    assert await reason_of(await session.call(tool)) == "process_lost"
    assert how in workers[0].output()
    await until(lambda: gone(*pids))


async def test_a_program_that_closed_its_input_is_over(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    pid = await pid_of(session)
    waiting = await waiting_call(workers, session, "deaf")
    assert await session.call_result("close_input") == "closing"
    assert await session.notify("notifications/1") == 202
    await asyncio.sleep(0.1)  # until it has been read; nobody tells
    assert await reason_of(await session.call("echo", {"text": "x"}, base_url=workers[1].url)) == "process_lost"
    assert await reason_of(waiting) == "process_lost"
    assert "closed its input" in workers[0].output()
    await until(lambda: gone(pid))


async def test_an_answer_that_came_right_before_the_death_is_delivered(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    messages = await (await session.call("answer_and_die", {"n": 200}, progress_token="t")).messages()
    assert [message.get("method") for message in messages] == ["notifications/progress"] * 200 + [None]
    assert messages[-1]["result"]["content"][0]["text"] == "died"


async def test_a_program_that_reads_nothing_has_its_requests_refused_in_the_end(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    assert await session.call_result("read_again", {"key": "read"}) == "deaf for now"
    text = "x" * 1_000_000
    calls = [
        asyncio.create_task((await session.call("length", {"text": text}, base_url=workers[n % 2].url)).result())
        for n in range(12)
    ]
    first, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert [call.result()["error"]["data"] for call in first] == [{"reason": "process_busy"}] * len(first)
    workers.release("read")
    answers = await asyncio.gather(*calls)
    refused = [answer for answer in answers if "error" in answer]
    assert 1 <= len(refused) <= 4
    lengths = [answer["result"]["content"][0]["text"] for answer in answers if "result" in answer]
    assert lengths == ["1000000"] * (12 - len(refused))


@pytest.mark.slow
async def test_messages_of_fifty_megabytes_pass_both_ways_through_either_replica(shared_workers: SharedWorkers) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    size = 50_000_000
    there = workers[1].url
    assert await session.call_result("length", {"text": "x" * size}, base_url=there) == str(size)
    assert len(await session.call_result("large", {"size": size}, base_url=there)) == size


@pytest.mark.parametrize("tool", ["surrogate", "not_a_number"])
async def test_a_result_that_json_cannot_carry_is_an_error_of_its_call(
    tool: str, shared_workers: SharedWorkers
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    answer = await (await session.call(tool, id="odd")).result()
    assert (answer["id"], answer["error"]["code"]) == ("odd", -32603)
    assert await session.call_result("echo", {"text": "on"}) == "on"


async def test_complaints_are_in_the_log_with_their_session_but_not_without_bound(
    shared_workers: SharedWorkers,
) -> None:
    workers = await shared_workers("stdio_app")
    session = await Session.initialize(workers[0].url)
    assert await session.call_result("complain", {"n": 3, "size": 5000}) == "complained"
    assert await session.call_result("complain", {"n": 2000}) == "complained"
    await session.delete()
    await until(lambda: logged(workers, "lines were left out"))
    lines = [line for line in workers[0].output().splitlines() if f"Session {session.session_id}, stderr: c" in line]
    assert 150 <= len(lines) <= 400
    assert max(map(len, lines)) < 2200
    assert lines[0].endswith("xxx ...")


async def logged(workers: Workers, text: str) -> bool:
    return text in workers[0].output()


async def test_a_stubborn_program_is_killed_with_its_children(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 2, options=program("stubborn", stop_timeout=0.3))
    session = await Session.initialize(workers[0].url)
    pids = [await pid_of(session), int(await session.call_result("child"))]
    assert (await session.delete(base_url=workers[1].url)).status == 200
    await until(lambda: gone(*pids), timeout=5)
    assert "is killed" in workers[0].output()


async def test_a_message_beyond_the_limit_ends_the_session_with_a_reason(start_workers: StartWorkers) -> None:
    workers = await start_workers("stdio_app", 1, options=program(max_message_size=1_000_000))
    session = await Session.initialize(workers[0].url)
    pid = await pid_of(session)
    assert (await session.call("length", {"text": "x" * 1_000_000})).status == 413
    assert await reason_of(await session.call("large", {"size": 5_000_000})) == "process_lost"
    assert "its program wrote a message of more than 1000000 bytes" in workers[0].output()
    await until(lambda: gone(pid))


async def test_a_program_sees_neither_the_database_nor_the_proxys_settings(
    migrated: str, start_workers: StartWorkers
) -> None:
    options = {"stdio": {"env": {"PGAPPNAME": "asked for", "EXTRA": "1"}}}
    secrets = {"PGPASSWORD": "secret", "PGSERVICEFILE": "secret", "PGAPPNAME": "not asked for"}
    workers = await start_workers("stdio_app", 1, options=options, environment=secrets)
    session = await Session.initialize(workers[0].url)
    environment = json.loads(await session.call_result("whoami"))["environment"]
    assert {name: value for name, value in environment.items() if name.startswith("PG")} == {"PGAPPNAME": "asked for"}
    assert environment["EXTRA"] == "1"
    assert [name for name in environment if name.startswith("MCP_PG_EVENTS")] == []
    assert migrated not in environment.values()
