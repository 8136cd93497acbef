"""Two requests have one credential exactly where an upstream could not tell them apart by it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp_pg_events.proxy import credentials
from mcp_pg_events.proxy.credentials import Accepted

LIFETIME = 10.0

ANN = {"authorization": "Bearer ann", "cookie": "a=1", "x-api-key": "k"}

sessions = st.sampled_from(["s", "s\0", "t", ""])
names = st.sampled_from(["authorization", "cookie", "x-api-key", "x-api", "x"])
values = st.sampled_from(["", "a", "a\0x\x001\0b", "\0", "ä", "\udc80", "1", "key"]) | st.text(max_size=4)
headers = st.dictionaries(names, values, max_size=4)
queries = st.sampled_from([b"", b"a", b"?", b"\0", b"\0?a", b"key=1"])
requests = st.tuples(sessions, headers, queries)

accepted = Accepted(LIFETIME)


@given(requests, requests)
def test_whatever_differs_makes_another_credential(
    one: tuple[str, dict[str, str], bytes], other: tuple[str, dict[str, str], bytes]
) -> None:
    assert (accepted.digest(*one) == accepted.digest(*other)) == (one == other)


@given(requests)
def test_the_order_of_headers_is_none_of_it(request: tuple[str, dict[str, str], bytes]) -> None:
    session_id, given_headers, query = request
    turned = dict(reversed(given_headers.items()))
    assert accepted.digest(session_id, turned, query) == accepted.digest(*request)


@pytest.mark.parametrize(
    "name",
    "accept content-type user-agent traceparent x-request-id x-forwarded-for mcp-protocol-version sec-fetch-mode "
    "if-none-match mcp-method".split(),
)
def test_what_says_nothing_of_who_asks_is_none_of_it(name: str) -> None:
    assert accepted.digest("s", {**ANN, name: "this"}, b"") == accepted.digest("s", ANN, b"")


@pytest.mark.parametrize(
    "name", ["authorization", "cookie", "x-api-key", "x-goog-iap-jwt-assertion", "x-forwarded-user", "apikey", "x-new"]
)
def test_whatever_an_upstream_may_go_by_is_a_part_of_it(name: str) -> None:
    assert accepted.digest("s", {**ANN, name: "this"}, b"") != accepted.digest("s", {**ANN, name: "that"}, b"")


def test_each_process_has_digests_of_its_own() -> None:
    assert Accepted(LIFETIME).digest("s", ANN, b"") != accepted.digest("s", ANN, b"")


class Clock:
    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    return clock


def test_a_credential_is_believed_for_its_lifetime_and_again_when_it_is_taken_again(clock: Clock) -> None:
    accepted = Accepted(LIFETIME)
    assert b"d" not in accepted
    accepted.add(b"d")
    clock.now += LIFETIME - 0.001
    assert b"d" in accepted and b"e" not in accepted
    clock.now += 0.001
    assert b"d" not in accepted
    accepted.add(b"d")
    clock.now += LIFETIME - 1
    accepted.add(b"d")
    clock.now += LIFETIME - 1
    assert b"d" in accepted


def test_to_be_asked_for_makes_it_live_no_longer(clock: Clock) -> None:
    accepted = Accepted(LIFETIME)
    accepted.add(b"d")
    for _ in range(10):
        assert b"d" in accepted
        clock.now += LIFETIME / 10
    assert b"d" not in accepted


def test_what_the_upstream_refused_is_forgotten_at_once(clock: Clock) -> None:
    accepted = Accepted(LIFETIME)
    accepted.add(b"d")
    accepted.remove(b"d")
    accepted.remove(b"unknown")
    assert b"d" not in accepted


def test_no_more_than_so_many_are_remembered_and_the_oldest_goes(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "REMEMBERED", 3)
    accepted = Accepted(LIFETIME)
    for digest in (b"a", b"b", b"c", b"a", b"d"):
        accepted.add(digest)
    assert [digest in accepted for digest in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
