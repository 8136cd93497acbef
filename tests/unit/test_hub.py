"""The readers of one worker: who wins, what is kept for a slow one, what wakes it, how it ends."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from mcp_pg_events.backend import Event
from mcp_pg_events.hub import BUFFER_BYTES, EndReason, Hub, Subscription

pytestmark = pytest.mark.anyio

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def event(seq: int, size: int = 10) -> Event:
    return Event(seq, b"x" * size, False, NOW)


def seqs(subscription: Subscription) -> list[int]:
    return [event.seq for event in subscription.take()]


# Who reads


async def test_only_the_newest_generation_of_a_stream_gets_its_events() -> None:
    hub = Hub()
    old, other = hub.subscribe(1, "s", 1), hub.subscribe(2, "s", 1)
    new = hub.subscribe(1, "s", 2)
    hub.publish(1, event(1))
    assert (old.end_reason, new.end_reason, other.end_reason) == ("superseded", None, None)
    assert (seqs(old), seqs(new), seqs(other)) == ([], [1], [])
    assert len(hub) == 2


async def test_an_attachment_that_was_overtaken_ends_at_once_and_takes_nobodys_place() -> None:
    hub = Hub()
    new = hub.subscribe(1, "s", 3)
    late = hub.subscribe(1, "s", 2)
    assert (late.end_reason, new.end_reason) == ("superseded", None)
    hub.unsubscribe(late)
    hub.publish(1, event(1))
    assert seqs(new) == [1]


async def test_a_newer_reader_elsewhere_ends_the_older_one_here_but_not_a_newer_one() -> None:
    hub = Hub()
    reader = hub.subscribe(1, "s", 5)
    for generation in (4, 5):
        hub.supersede(1, generation)
        assert reader.end_reason is None
    hub.supersede(1, 6)
    assert reader.end_reason == "superseded"
    hub.supersede(99, 1)


async def test_who_left_gets_nothing_more_and_does_not_take_its_successor_along() -> None:
    hub = Hub()
    old = hub.subscribe(1, "s", 1)
    new = hub.subscribe(1, "s", 2)
    hub.unsubscribe(old)
    hub.publish(1, event(1))
    assert seqs(new) == [1]
    hub.unsubscribe(new)
    hub.publish(1, event(2))
    assert (seqs(new), len(hub), hub.sessions()) == ([], 0, set())


# What is kept (invariant 18)


async def test_a_buffer_is_bounded_and_what_it_lost_is_in_the_log() -> None:
    hub = Hub()
    slow, other = hub.subscribe(1, "s", 1), hub.subscribe(2, "s", 1)
    size = 1000
    fits = BUFFER_BYTES // size
    for seq in range(1, fits + 1):
        hub.publish(1, event(seq, size))
    assert not slow.behind
    assert len(slow.events) == fits
    for seq in range(fits + 1, 10 * fits):
        hub.publish(1, event(seq, size))
        assert sum(len(kept.payload) for kept in slow.events) <= BUFFER_BYTES
    assert slow.behind and slow.changed
    assert not other.behind
    # It takes live events again from the moment at which it begins to read the log.
    slow.behind = False
    hub.publish(1, event(10 * fits))
    assert seqs(slow) == [10 * fits]


async def test_an_event_that_is_larger_than_the_buffer_is_delivered_all_the_same() -> None:
    hub = Hub()
    reader = hub.subscribe(1, "s", 1)
    hub.publish(1, event(1, 2 * BUFFER_BYTES))
    assert not reader.behind
    assert seqs(reader) == [1]
    hub.publish(1, event(2, 2 * BUFFER_BYTES))
    assert seqs(reader) == [2], "what was taken still counted"


async def test_nothing_is_kept_for_a_reader_that_has_to_go_to_the_log_anyway() -> None:
    hub = Hub()
    reader = hub.subscribe(1, "s", 1)
    hub.wake(1)
    hub.publish(1, event(1))
    assert (reader.behind, list(reader.events)) == (True, [])


# What wakes


async def waiting(subscription: Subscription) -> asyncio.Task[bool]:
    task = asyncio.create_task(subscription.wait(60))
    await asyncio.sleep(0)
    assert not task.done()
    return task


@pytest.mark.parametrize("what", ["publish", "wake", "wake_all", "end_session", "end_stream", "drain", "supersede"])
async def test_a_reader_that_waits_wakes_at_once(what: str) -> None:
    hub = Hub()
    task = await waiting(hub.subscribe(1, "s", 1))
    untouched = await waiting(hub.subscribe(2, "another", 1))
    match what:
        case "publish":
            hub.publish(1, event(1))
        case "wake":
            hub.wake(1)
        case "end_session":
            hub.end_session("s")
        case "end_stream":
            assert hub.end_stream(1, "closed")
        case "supersede":
            hub.supersede(1, 2)
        case "wake_all":
            hub.wake_all()
        case "drain":
            hub.drain()
    assert await asyncio.wait_for(task, 1)
    if what in ("wake_all", "drain"):
        assert await asyncio.wait_for(untouched, 1)
    else:
        await asyncio.sleep(0)
        assert not untouched.done(), "another stream's reader woke too"
        untouched.cancel()


async def test_who_has_something_to_do_does_not_wait_and_who_has_nothing_waits_in_vain() -> None:
    hub = Hub()
    reader = hub.subscribe(1, "s", 1)
    assert not await reader.wait(0.001)
    hub.publish(1, event(1))
    assert await asyncio.wait_for(reader.wait(60), 1)
    reader.take()
    assert not await reader.wait(0.001)


async def test_a_wait_that_was_cancelled_leaves_nothing_behind() -> None:
    hub = Hub()
    reader = hub.subscribe(1, "s", 1)
    task = await waiting(reader)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hub.publish(1, event(1))
    assert await reader.wait(60)


# How it ends


@pytest.mark.parametrize("reason", ["superseded", "closed", "drained", "ended"])
async def test_the_first_reason_to_end_stays_and_is_told_once(reason: EndReason) -> None:
    hub = Hub()
    reader = hub.subscribe(1, "s", 1)
    told: list[EndReason | None] = []
    reader.on_end = lambda: told.append(reader.end_reason)
    reader.end(reason)
    reader.end("closed" if reason != "closed" else "ended")
    hub.drain()
    assert told == [reason]
    assert reader.end_reason == reason


async def test_the_end_of_a_session_sends_its_readers_to_the_log_for_the_finals() -> None:
    hub = Hub()
    mine, theirs = hub.subscribe(1, "mine", 1), hub.subscribe(2, "theirs", 1)
    hub.end_session("mine")
    assert (mine.behind, mine.end_reason) == (True, None)
    assert not theirs.changed


async def test_a_stream_that_is_not_read_here_is_ended_elsewhere() -> None:
    hub = Hub()
    assert not hub.end_stream(1, "closed")
    reader = hub.subscribe(1, "s", 1)
    assert hub.end_stream(1, "closed")
    assert reader.end_reason == "closed"


async def test_a_worker_that_drains_ends_every_reader_also_those_to_come() -> None:
    hub = Hub()
    before = hub.subscribe(1, "s", 1)
    hub.drain()
    after = hub.subscribe(2, "s", 1)
    assert (before.end_reason, after.end_reason) == ("drained", "drained")


async def test_a_response_that_cannot_be_resumed_yet_stays_until_its_client_has_an_id() -> None:
    hub = Hub()
    early = hub.subscribe(1, "s", 1, resumable=False)
    hub.drain()
    late = hub.subscribe(2, "s", 1, resumable=False)
    for reader in (early, late):
        assert reader.end_reason is None
        hub.publish(reader.stream, event(1))
        assert seqs(reader) == [1]
        reader.gave_id()
        assert reader.end_reason == "drained"
    # Where nothing drains, an id changes nothing.
    quiet = Hub().subscribe(1, "s", 1, resumable=False)
    quiet.gave_id()
    assert quiet.end_reason is None


async def test_the_sessions_that_somebody_reads() -> None:
    hub = Hub()
    for stream, session in ((1, "a"), (2, "a"), (3, "b")):
        hub.subscribe(stream, session, 1)
    assert hub.sessions() == {"a", "b"}
