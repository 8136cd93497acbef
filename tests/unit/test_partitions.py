"""The plan of partitions: no gap, no overlap, in UTC, whatever exists already."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp_pg_events.partitions import INTERVALS, Interval, Partition, Policy, ceiling, floor, parse_name, plan

moments = st.datetimes(
    min_value=datetime(2000, 1, 1),
    max_value=datetime(2100, 1, 1),
    timezones=st.integers(-12 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
)
intervals = st.sampled_from(INTERVALS)

patient = settings(deadline=None)  # a busy machine is no failure


@st.composite
def situations(draw: st.DrawFn) -> tuple[datetime, list[Partition], Policy]:
    """A time, partitions around it that were made under other policies, and the policy of now."""
    now = draw(moments)
    existing: list[Partition] = []
    lower = floor(now, draw(intervals)) - timedelta(hours=draw(st.integers(0, 2000)))
    for _ in range(draw(st.integers(0, 8))):
        lower += timedelta(hours=draw(st.sampled_from([0, 0, 1, 5, 24, 200])))
        upper = lower + timedelta(hours=draw(st.integers(1, 800)))
        existing.append(Partition(lower, upper))
        lower = upper
    return now, draw(st.permutations(existing)), Policy(draw(intervals), draw(st.integers(0, 4)))


@patient
@given(situations())
def test_after_the_plan_every_moment_of_the_intervals_ahead_has_exactly_one_partition(
    situation: tuple[datetime, list[Partition], Policy],
) -> None:
    now, existing, policy = situation
    create = plan(now, existing, policy).create

    together = sorted([*existing, *create])
    for one, next_one in pairwise(together):
        assert one.upper <= next_one.lower, "overlap"

    start = position = floor(now, policy.interval)
    for partition in together:
        if partition.lower <= position < partition.upper:
            position = partition.upper
    end = start
    for _ in range(policy.ahead + 1):
        end = ceiling(end, policy.interval)
    assert start <= now < end
    assert position >= end, "gap"
    for partition in create:
        assert start <= partition.lower < partition.upper <= end, "more than was asked for"


@patient
@given(situations())
def test_a_plan_that_was_carried_out_leaves_nothing_to_do(situation: tuple[datetime, list[Partition], Policy]) -> None:
    now, existing, policy = situation
    create = plan(now, existing, policy).create
    assert plan(now, [*existing, *create], policy).create == ()


@patient
@given(situations())
def test_names_are_distinct_and_give_the_lower_bound_back(situation: tuple[datetime, list[Partition], Policy]) -> None:
    create = plan(*situation).create
    assert len({partition.name for partition in create}) == len(create)
    for partition in create:
        assert partition.lower.utcoffset() == timedelta(0)
        assert parse_name(partition.name) == partition.lower


@patient
@given(moments, intervals)
def test_an_interval_holds_its_moment_and_ends_where_the_next_begins(moment: datetime, interval: Interval) -> None:
    start = floor(moment, interval)
    end = ceiling(start, interval)
    assert start <= moment < end
    assert floor(end, interval) == end
    assert floor(end - timedelta(microseconds=1), interval) == start


@pytest.mark.parametrize(
    ("interval", "start", "end"),
    [
        ("hour", datetime(2024, 2, 29, 22, tzinfo=UTC), datetime(2024, 2, 29, 23, tzinfo=UTC)),
        ("day", datetime(2024, 2, 29, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)),
        ("week", datetime(2024, 2, 26, tzinfo=UTC), datetime(2024, 3, 4, tzinfo=UTC)),
        ("month", datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)),
    ],
)
def test_bounds_are_utc_wherever_the_clock_stands(interval: Interval, start: datetime, end: datetime) -> None:
    in_tokyo = datetime(2024, 3, 1, 7, 59, tzinfo=timezone(timedelta(hours=9)))
    assert floor(in_tokyo, interval) == start
    assert ceiling(start, interval) == end


def test_a_moment_without_a_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        floor(datetime(2024, 1, 1), "day")
    with pytest.raises(ValueError, match="time zone"):
        Partition(datetime(2024, 1, 1), datetime(2024, 1, 2))


@pytest.mark.parametrize("name", ["events_p2024010100", "events_p2024010100_2", "events_p2024010100_17"])
def test_a_partition_s_name_is_recognised(name: str) -> None:
    assert parse_name(name) == datetime(2024, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "name",
    [
        "events",
        "events_p",
        "events_p2024",
        "events_p2024130100",
        "events_p2024010100x",
        "my_events_p2024010100",
        "events_p2024010100\n",
        "events_p2024010100_",
        "events_p\N{ARABIC-INDIC DIGIT TWO}024010100",
    ],
)
def test_an_unknown_name_is_left_alone(name: str) -> None:
    assert parse_name(name) is None


@patient
@given(situations(), st.timedeltas(timedelta(hours=1), timedelta(days=90)))
def test_dropped_is_what_is_older_than_the_ttl_and_nothing_else(
    situation: tuple[datetime, list[Partition], Policy], ttl: timedelta
) -> None:
    now, existing, policy = situation
    planned = plan(now, existing, Policy(policy.interval, policy.ahead, ttl))
    assert planned.create == plan(now, existing, policy).create, "what is made has nothing to do with it"
    assert list(planned.drop) == sorted(planned.drop), "the oldest goes first"
    for partition in existing:
        every_event_expired = partition.upper <= now - ttl
        assert (partition in planned.drop) == every_event_expired
    assert plan(now, existing, policy).drop == ()


@patient
@given(
    situations(), st.timedeltas(timedelta(hours=1), timedelta(days=90)), st.timedeltas(timedelta(), timedelta(days=400))
)
def test_a_clock_that_goes_on_drops_no_less_and_never_the_present(
    situation: tuple[datetime, list[Partition], Policy], ttl: timedelta, later: timedelta
) -> None:
    now, existing, policy = situation
    keeping = Policy(policy.interval, policy.ahead, ttl)
    first, second = plan(now, existing, keeping), plan(now + later, existing, keeping)
    assert set(first.drop) <= set(second.drop)
    assert not any(partition.lower <= now < partition.upper for partition in first.drop)
