"""Frames as a browser's parser reads them, and event ids that come back as they went out (invariant 11)."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcp_pg_events import sse
from tests.support.sse import Comment, Event, SseParser

BIGINT = st.integers(0, 2**63 - 1)


def parse(frames: bytes) -> list[Event | Comment]:
    return list(SseParser().feed(frames))


# Frames


@given(stream=BIGINT, seq=BIGINT, message=st.recursive(st.none() | st.booleans() | st.text(), st.lists))
@example(1, 1, "\r\n\r\nid: 9-9\ndata: x\x00\x85\u2028")
def test_a_message_is_one_event_whatever_is_in_it(stream: int, seq: int, message: object) -> None:
    payload = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert parse(sse.frame(stream, seq, payload.encode())) == [Event(f"{stream}-{seq}", "message", payload, None)]


def test_frames_follow_each_other() -> None:
    frames = sse.frame(1, 1, b'"a"') + sse.KEEP_ALIVE + sse.frame(1, 2, b'"b"')
    assert parse(frames) == [
        Event("1-1", "message", '"a"', None),
        Comment("keep-alive"),
        Event("1-2", "message", '"b"', None),
    ]


@pytest.mark.parametrize("retry", [None, 0, 1500])
def test_a_priming_event_is_a_cursor_without_data(retry: int | None) -> None:
    assert parse(sse.priming_frame(7, 3, retry)) == [Event("7-3", "message", "", retry)]


# Ids


@given(BIGINT, BIGINT)
@example(2**63 - 1, 2**63 - 1)
@example(0, 0)
def test_an_id_comes_back_as_it_went_out(stream: int, seq: int) -> None:
    text = sse.format_event_id(stream, seq)
    assert sse.parse_event_id(text) == (stream, seq)
    assert sse.frame(stream, seq, b"{}").split(b"\n")[1] == b"id: " + text.encode()


@given(st.text() | st.from_regex(r"\A[-+ 0-9_]{1,12}\Z"))
def test_what_is_taken_for_an_id_is_one_that_was_given_out(text: str) -> None:
    if (parsed := sse.parse_event_id(text)) is not None:
        assert sse.format_event_id(*parsed) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "1",
        "1-",
        "-1",
        "1--1",
        "-1-1",
        "+1-1",
        "1-+1",
        "01-1",
        "1-01",
        "00-0",
        "1-1-1",
        " 1-1",
        "1-1 ",
        "1-1\n",
        "1 -1",
        "1_0-1",
        "0x1-1",
        "1.0-1",
        "1e3-1",
        "\u0661-\u0661",
        "\uff11-\uff11",
        "1\u20101",
        "1-1\x00",
        "9" * 20 + "-1",
        "1-" + "9" * 20,
        "9" * 100_000 + "-1",
        "_GET_stream",
        "1'; DROP TABLE events; --",
    ],
)
def test_what_was_never_an_id_is_refused(text: str) -> None:
    assert sse.parse_event_id(text) is None
