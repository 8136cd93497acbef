"""One SSE response: its position, its way to the log and back, its end (invariants 3, 13, 16, 17 and 18)."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from mcp_pg_events import reader
from mcp_pg_events.backend import EventLog
from mcp_pg_events.errors import Error
from mcp_pg_events.hub import BUFFER_BYTES, EndReason, Hub
from mcp_pg_events.reader import read_final
from tests.support import sse
from tests.support.reading import NOW, STREAM, MemoryLog, reading

pytestmark = pytest.mark.anyio


# Position


async def test_history_and_then_what_comes_live_without_reading_again() -> None:
    log = MemoryLog()
    log.grow(5)
    async with reading(log, position=2) as r:
        r.subscription.fall_behind()
        await r.client.until(5)
        r.live(3)
        await r.client.until(8)
        r.live(final=True)
        await r.end()
    assert r.client.seqs == [3, 4, 5, 6, 7, 8, 9]
    assert log.reads == [2], "what came live was read from the log as well"
    assert (r.client.ended_cleanly, r.reader.complete, r.reader.position) == (True, True, 9)


async def test_what_was_published_during_the_read_is_not_sent_twice() -> None:
    log = MemoryLog()
    async with reading(log) as r:
        r.subscription.fall_behind()
        r.live(3)
        log.grow(2)
        # 1 to 3 wait in the buffer, and the log has them too.
        r.hub.publish(STREAM, log.events[0])
        r.hub.wake(STREAM)
        await r.client.until(5)
        r.live(1, final=True)
        await r.end()
    assert r.client.seqs == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("what", ["wake", "publish", "overflow"])
async def test_what_comes_during_a_read_is_a_reason_to_read_again(what: str) -> None:
    log = MemoryLog()
    log.grow(1)
    async with reading(log) as r:

        def during_read() -> None:
            log.during_read = lambda: None
            if what == "publish":
                r.live(1)
            elif what == "wake":
                log.grow(1)
                r.hub.wake(STREAM)
            else:
                r.live(2, size=BUFFER_BYTES)

        log.during_read = during_read
        r.subscription.fall_behind()
        await r.client.until(2)
        r.live(1, final=True)
        await r.end()
    assert r.client.seqs == list(range(1, len(log.events) + 1))


async def test_several_pages_follow_each_other_without_a_wake_up() -> None:
    log = MemoryLog()
    log.page_size = 10
    log.grow(35, final=True)
    async with reading(log) as r:
        r.subscription.fall_behind()
        await r.end()
    assert r.client.seqs == list(range(1, 36))
    assert log.reads == [0, 10, 20, 30]


async def test_a_gap_before_what_comes_live_is_filled_from_the_log() -> None:
    async with reading() as r:
        r.live(1)
        await r.client.until(1)
        r.log.grow(1)  # another worker's, whose notification got lost
        r.live(1)
        await r.client.until(3)
        assert r.client.seqs == [1, 2, 3]


async def test_a_gap_between_live_events_is_filled_from_the_log() -> None:
    """A stream with several writers, and a client so slow that this worker's events of two flushes wait for it."""
    async with reading() as r:
        await r.stall()
        r.live(1)
        r.log.grow(1)
        r.live(2, final=True)
        r.client.taking.set()
        await r.end()
    assert r.client.seqs == [1, 2, 3, 4, 5, 6]


async def test_a_lost_notification_only_delays() -> None:
    async with reading(poll_interval=0.05) as r:
        r.log.grow(2)
        await r.client.until(2)
        r.log.grow(1, final=True)
        await r.end()
    assert r.client.seqs == [1, 2, 3]


# Slow readers (invariant 18)


async def test_a_client_that_takes_nothing_is_held_in_bounds_and_then_caught_up_from_the_log() -> None:
    size = 10_000
    count = 5 * BUFFER_BYTES // size
    async with reading() as r:
        await r.stall()
        for _ in range(count):
            r.live(1, size=size)
            assert sum(len(event.payload) for event in r.subscription.events) <= BUFFER_BYTES
        r.client.taking.set()
        await r.client.until(count + 2)
        r.live(1, final=True)
        await r.end()
    assert r.client.seqs == list(range(1, count + 4))


@pytest.fixture
def short_close_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reader.CLOSE_TIMEOUT < 1, "an older connection ends within a second"
    monkeypatch.setattr(reader, "CLOSE_TIMEOUT", 0.05)


@pytest.mark.usefixtures("short_close_timeout")
@pytest.mark.parametrize("reason", ["superseded", "closed", "drained", "ended"])
async def test_a_client_that_takes_nothing_does_not_hold_up_the_end(reason: EndReason) -> None:
    async with reading() as r:
        await r.stall()
        r.subscription.end(reason)
        await r.end()


@pytest.mark.usefixtures("short_close_timeout")
async def test_an_end_that_comes_before_the_response_has_begun_is_bounded_too() -> None:
    async with reading() as r:
        r.client.taking.clear()
        r.subscription.end("superseded")
        await r.end()


async def test_a_client_that_goes_ends_the_response_at_once() -> None:
    async with reading() as r:
        await r.stall()
        r.client.gone.set()
        await r.end()
    assert not r.reader.complete
    assert r.reader.position == 1, "an event that nobody took counts as delivered"


# Keep-alive


async def test_a_quiet_response_is_kept_alive_without_reading_the_log() -> None:
    async with reading(keep_alive=0.02) as r:
        await r.client.kept_alive(3)
        assert r.log.reads == []


# Priming (invariant 17)


async def test_clients_that_know_priming_get_a_cursor_first() -> None:
    async with reading(position=4, retry=250) as r:
        r.log.grow(4)
        r.live(1, final=True)
        await r.end()
    assert r.client.items[0] == sse.Event(f"{STREAM}-4", "message", "", 250)
    assert r.client.seqs == [5]
    assert r.client.sent[0] == {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}


@pytest.mark.parametrize("reason", [None, "closed", "drained", "ended", "superseded"])
async def test_older_clients_get_no_event_without_data(reason: EndReason | None) -> None:
    async with reading(primes=False, retry=250) as r:
        r.live(1, final=reason is None)
        await r.client.until(1)
        if reason is not None:
            r.subscription.end(reason)
        await r.end()
    assert [item.data for item in r.client.items if isinstance(item, sse.Event)] == ['"x"']
    assert r.client.ended_cleanly
    # The headers go out although there is nothing to say yet.
    assert r.client.sent[1] == {"type": "http.response.body", "body": b"", "more_body": True}


# Ends (invariant 13)


@pytest.mark.parametrize(
    ("reason", "cursor", "complete"),
    [("closed", True, False), ("drained", True, False), ("ended", True, False), ("superseded", False, True)],
)
async def test_the_server_ends_cleanly_and_with_the_cursor_once_more(
    reason: EndReason, cursor: bool, complete: bool
) -> None:
    async with reading(retry=250) as r:
        r.live(2)
        await r.client.until(2)
        r.subscription.end(reason)
        await r.end()
    assert r.client.ended_cleanly
    assert r.reader.complete == complete
    expected = sse.Event(f"{STREAM}-2", "message", "", 250)
    assert (r.client.items[-1] == expected) == cursor, "its successor has the cursor" if not cursor else "no cursor"


async def test_a_newer_reader_in_the_log_ends_this_one() -> None:
    async with reading() as r:
        r.live(1)
        await r.client.until(1)
        r.log.generation = 2
        r.log.grow(1)
        r.hub.wake(STREAM)
        await r.end()
    assert r.client.seqs == [1], "it went on for its successor"
    assert (r.client.ended_cleanly, r.reader.complete) == (True, True)


async def test_events_that_are_gone_end_the_response_instead_of_leaving_a_gap() -> None:
    log = MemoryLog()
    log.grow(5)
    log.floor = 3
    async with reading(log, position=1) as r:
        r.subscription.fall_behind()
        await r.end()
    assert r.client.seqs == []
    assert r.client.ended_cleanly
    assert r.client.items[-1] == sse.Event(f"{STREAM}-1", "message", "", None), "the client cannot learn what it missed"


async def test_a_stream_that_ended_without_more_to_send_ends_its_response() -> None:
    log = MemoryLog()
    log.grow(2, final=True)
    async with reading(log, position=2) as r:
        r.subscription.fall_behind()
        await r.end()
    assert (r.client.seqs, r.client.ended_cleanly, r.reader.complete) == ([], True, True)


# Outages


async def test_an_outage_is_waited_out_with_keep_alives() -> None:
    log = MemoryLog()
    log.failing = True
    async with reading(log, keep_alive=0.01) as r:
        r.subscription.fall_behind()
        await r.client.kept_alive(1)
        log.grow(2)
        log.failing = False
        await r.client.until(2)


async def test_an_outage_that_lasts_ends_the_response_cleanly_and_with_a_cursor() -> None:
    log = MemoryLog()
    log.grow(1)
    log.failing = True
    async with reading(log, position=1, outage_timeout=0.1) as r:
        r.subscription.fall_behind()
        await r.end()
    assert r.client.ended_cleanly
    assert r.client.items[-1] == sse.Event(f"{STREAM}-1", "message", "", None)


# Answers in JSON


@pytest.mark.parametrize("behind", [False, True])
async def test_an_answer_in_json_is_the_final_alone(behind: bool) -> None:
    log, hub = MemoryLog(), Hub()
    subscription = hub.subscribe(STREAM, "session", 1)
    answer = asyncio.create_task(read_final(subscription, cast(EventLog, log), NOW, 60))
    for event in log.grow(3) + log.grow(1, size=9, final=True):
        if behind:
            subscription.fall_behind()
        else:
            hub.publish(STREAM, event)
        await asyncio.sleep(0)
    assert await asyncio.wait_for(answer, 5) == b'"xxxxxxxxx"'


async def test_an_answer_in_json_that_never_comes() -> None:
    log, hub = MemoryLog(), Hub()
    subscription = hub.subscribe(STREAM, "session", 1)
    answer = asyncio.create_task(read_final(subscription, cast(EventLog, log), NOW, 60))
    await asyncio.sleep(0)
    subscription.end("ended")
    assert await asyncio.wait_for(answer, 5) is None


async def test_an_answer_in_json_waits_an_outage_out_within_its_bound() -> None:
    log, hub = MemoryLog(), Hub()
    subscription = hub.subscribe(STREAM, "session", 1)
    log.failing = True
    subscription.fall_behind()
    with pytest.raises(Error):
        await asyncio.wait_for(read_final(subscription, cast(EventLog, log), NOW, 0.05), 5)
    answer = asyncio.create_task(read_final(subscription, cast(EventLog, log), NOW, 60))
    subscription.fall_behind()
    await log.failed()
    log.grow(1, final=True)
    log.failing = False
    assert await asyncio.wait_for(answer, 5) == b'"x"'
