"""A stream of events means the same however its bytes are cut (HTML standard, section 9.2.6)."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_pg_events.proxy.event_stream import EventStream, EventTooLarge, ServerSentEvent

LIMIT = 10_000

fields = st.sampled_from([b"data", b"id", b"event", b"retry", b"", b"other", b"data ", b"\xef\xbb\xbfdata"])
values = st.sampled_from([b"", b" ", b"x", b" two words", b"1000", b"a:b", b"\0", b"\xff", b'{"a": 1}', b"y" * 30])
lines = st.one_of(
    st.just(b""), st.builds(lambda name, value: name + b":" + value, fields, values), st.sampled_from([b"data", b"id"])
)
ends = st.sampled_from([b"\n", b"\r", b"\r\n"])
streams = st.builds(
    lambda pairs: b"".join(line + end for line, end in pairs), st.lists(st.tuples(lines, ends), max_size=30)
)


def reference(stream: bytes) -> list[ServerSentEvent]:
    """The standard's steps, one after the other, on the whole stream."""
    # The end of the last line may be the first half of a CRLF, which changes nothing.
    *whole, _ = re.split(rb"\r\n|\r|\n", stream.removeprefix(b"\xef\xbb\xbf"))
    found, event, data, event_id = [], b"", [], None
    for line in whole:
        name, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if line == b"":
            if data or event_id is not None:
                found.append(ServerSentEvent(event or b"message", b"\n".join(data), event_id))
            event, data, event_id = b"", [], None
        elif name == b"data":
            data.append(value)
        elif name == b"event":
            event = value
        elif name == b"id" and b"\0" not in value:
            event_id = value
    return found


@given(streams, st.lists(st.integers(0, 400), max_size=8))
def test_every_way_to_cut_a_stream_gives_the_same_events(stream: bytes, cuts: list[int]) -> None:
    parser = EventStream(LIMIT)
    found = []
    positions = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in itertools.pairwise(positions):
        found += parser.feed(stream[start:end])
    assert found == reference(stream)


@given(streams)
def test_a_stream_may_come_byte_by_byte(stream: bytes) -> None:
    parser = EventStream(LIMIT)
    assert [event for n in range(len(stream)) for event in parser.feed(stream[n : n + 1])] == reference(stream)


def test_the_last_hint_is_kept_in_seconds() -> None:
    parser = EventStream(LIMIT)
    parser.feed(b"retry: 10\n\nretry: 2500\nretry: never\nretry: 99999999999\n")
    assert parser.retry == 2.5


def test_an_id_that_is_too_long_counts_as_none() -> None:
    [event] = EventStream(LIMIT).feed(b"id: " + b"x" * 4097 + b"\ndata: 1\n\n")
    assert event.id is None


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 100 + b"\n", b"x" * 100, b"data: x\n" * 10], ids=repr)
def test_an_event_has_a_limit_in_whatever_way_it_grows(piece: bytes) -> None:
    parser = EventStream(LIMIT)
    with pytest.raises(EventTooLarge):
        for _ in range(LIMIT):
            parser.feed(piece)


def test_a_stream_of_events_and_comments_has_none() -> None:
    parser = EventStream(LIMIT)
    for _ in range(3):
        for _ in range(LIMIT // 50):
            assert parser.feed(b": keep-alive\n\n") == []
            assert len(parser.feed(b"data: " + b"x" * 200 + b"\n\n")) == 1
        assert all(parser.feed(b": a comment\n") == [] for _ in range(LIMIT))


def test_the_time_of_a_large_event_grows_with_its_size_alone() -> None:
    def seconds(size: int) -> float:
        parser = EventStream(size + 100)
        began = time.process_time()
        parser.feed(b"data: ")
        for _ in range(size // 1000):
            parser.feed(b"x" * 1000)
        [event] = parser.feed(b"\n\n")
        assert len(event.data) == size
        return time.process_time() - began

    seconds(1_000_000)
    # Were it quadratic, 16 times the size would take 256 times as long.
    assert seconds(32_000_000) < 100 * max(seconds(2_000_000), 0.001)
