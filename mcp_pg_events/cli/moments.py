"""Moments as options take them: `12h` ago, `7d` ago, `2026-11-26`, `2026-11-26T12:00:00+01:00`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import typer

from .retention import parse_duration

__all__ = ["parse_moment"]


def parse_moment(text: str) -> datetime | timedelta:
    """A span, which means so long ago, or a date or time of ISO 8601, in UTC where it names no offset.

    Raises `typer.BadParameter` for anything else.
    """
    try:
        return parse_duration(text)
    except typer.BadParameter:
        pass
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither a time span such as 2h, nor a time such as 2026-11-26T12:00."
        ) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
