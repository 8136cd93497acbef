"""Which partitions of `events` there should be: names, bounds, and a pure plan.

`sql/ensure_partitions.sql` carries the same plan out in the database, for the migration and for every worker; an
integration test holds the two against each other. Nothing here does I/O: what exists, and what time it is, come as
arguments, and a `Plan` goes back to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, get_args

__all__ = ["INTERVALS", "Interval", "Partition", "Plan", "Policy", "ceiling", "floor", "parse_name", "plan"]

Interval = Literal["hour", "day", "week", "month"]

INTERVALS: tuple[Interval, ...] = get_args(Interval)

_NAME = re.compile(r"events_p(\d{10})(?:_\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True, order=True)
class Partition:
    """Events of `lower <= created_at < upper`."""

    lower: datetime
    upper: datetime

    def __post_init__(self) -> None:
        if self.lower.utcoffset() is None or self.upper.utcoffset() is None:
            raise ValueError("bounds need a time zone")
        if self.lower >= self.upper:
            raise ValueError(f"{self.lower} is not before {self.upper}")

    @property
    def name(self) -> str:
        """The table's name, after the lower bound in UTC; the database appends _2 where another table has it."""
        return f"events_p{self.lower.astimezone(UTC):%Y%m%d%H}"


@dataclass(frozen=True, slots=True)
class Policy:
    """How long a partition is, how many are made ahead of the one in use, and how long an event is kept at least."""

    interval: Interval = "day"
    ahead: int = 2
    ttl: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in order."""

    create: tuple[Partition, ...]
    drop: tuple[Partition, ...] = ()


def plan(now: datetime, existing: Iterable[Partition], policy: Policy) -> Plan:
    """Return the partitions to make: the interval of `now` and `policy.ahead` more, less what `existing` ones cover.

    Where the interval was changed, a new partition is clipped to the gap that the older ones leave. To drop are those
    whose every event is older than `policy.ttl`, the oldest first; none without one.
    """
    covered = sorted(existing)
    create: list[Partition] = []
    lower = floor(now, policy.interval)
    for _ in range(policy.ahead + 1):
        upper = ceiling(lower, policy.interval)
        position = lower
        for other in covered:
            if other.upper <= position or other.lower >= upper:
                continue
            if position < other.lower:
                create.append(Partition(position, other.lower))
            position = max(position, other.upper)
        if position < upper:
            create.append(Partition(position, upper))
        lower = upper
    expired = () if policy.ttl is None else tuple(other for other in covered if now - other.upper >= policy.ttl)
    return Plan(tuple(create), expired)


def floor(moment: datetime, interval: Interval) -> datetime:
    """Return the start, in UTC, of the interval that `moment` is in, as PostgreSQL's date_trunc does."""
    if moment.utcoffset() is None:
        raise ValueError("a moment without a time zone has no interval")
    moment = moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if interval == "hour":
        return moment
    day = moment.replace(hour=0)
    if interval == "day":
        return day
    return day - timedelta(days=day.weekday()) if interval == "week" else day.replace(day=1)


def ceiling(start: datetime, interval: Interval) -> datetime:
    """Return the end of the interval that starts at `start`."""
    if interval == "month":
        return (start + timedelta(days=31)).replace(day=1)
    return start + {"hour": timedelta(hours=1), "day": timedelta(days=1), "week": timedelta(weeks=1)}[interval]


def parse_name(name: str) -> datetime | None:
    """Return the lower bound in a partition's name; None for a table that is not ours, which is left alone."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    try:
        return datetime.strptime(match[1], "%Y%m%d%H").replace(tzinfo=UTC)
    except ValueError:
        return None
