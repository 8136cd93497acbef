"""`mcp-pg-events retention`: one pass, from cron. Next: `mcp_pg_events.retention`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..settings import Settings
from .options import Dsn, Schema

if TYPE_CHECKING:
    from ..retention import Outcome, Report

__all__ = ["parse_duration", "retention", "span_option"]

TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: something is left, and a later pass will do it."""

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


_LONGEST = timedelta(days=36500)


def parse_duration(text: str) -> timedelta:
    """`90s`, `30m`, `12h`, `7d` or `2w` as a time span. Raises `typer.BadParameter` for anything else."""
    match = re.fullmatch(r"([0-9]{1,6})([smhdw])", text.strip(), re.ASCII)
    if match is None or not int(match[1]):
        raise typer.BadParameter(f"{text!r} is no time span such as 12h, 7d or 4w.")
    span = timedelta(**{_UNITS[match[2]]: int(match[1])})
    if span >= _LONGEST:
        raise typer.BadParameter(f"{text!r} is longer than a hundred years.")
    return span


def span_option(help: str) -> Any:
    """An option that takes such a span, for the annotation of a parameter."""
    return typer.Option(metavar="SPAN", parser=parse_duration, help=help, show_default=False)


def retention(
    dsn: Dsn = None,
    schema: Schema = None,
    ttl: Annotated[
        timedelta | None,
        span_option("How long an event is kept at least: 12h, 7d, 4w. Without it nothing is dropped."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    archive: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            writable=True,
            help="Write each partition to DIR/NAME.jsonl.gz, and verify it, before it is dropped.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Drop expired partitions of the event log, make those to come, and remove rows that nothing refers to any more.

    Run it once a day as the tables' owner, from cron, a systemd timer or a Kubernetes CronJob. It hurts no running
    server, and a server hurts nothing when it is forgotten: the log then only grows.

    Exit codes: 0 done, 1 failed, 2 wrong options, 75 something is left for the next time, since somebody reads a
    partition in a long transaction, holds a lock, or another pass runs.

    Examples:

        mcp-pg-events retention --ttl 7d

        mcp-pg-events retention --ttl 4w --archive /var/backups/mcp --json
    """
    from .. import migrate
    from .. import retention as passes

    if archive is not None and ttl is None:
        raise typer.BadParameter("--archive needs --ttl, without which nothing is dropped.")
    settings = Settings.given(dsn=dsn, schema=schema)
    database = migrate.require_dsn(settings.database)
    show = sys.stderr.isatty() and not as_json

    def tell(name: str, place: int, count: int) -> None:
        if show:
            filled = 20 * (place - 1) // count
            print(
                f"\r[{'#' * filled}{'.' * (20 - filled)}] {place}/{count} {name} ", end="", file=sys.stderr, flush=True
            )

    report = passes.run(
        database,
        schema=settings.schema_name,
        ttl=ttl,
        dry_run=dry_run,
        archive_to=archive,
        on_partition=tell,
    )
    if show and report.partitions:
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    print(json.dumps(_plain(report)) if as_json else "\n".join(_lines(report, ttl)))
    if report.contended:
        raise typer.Exit(TRY_AGAIN)


def _lines(report: Report, ttl: timedelta | None) -> list[str]:
    from ..operator.text import counted

    if report.busy:
        return ["Another pass runs in this schema; this one stepped aside."]
    lines = []
    if report.locked:
        lines.append("locked     Somebody holds a lock that this pass needs; the next pass goes on.")
    if report.created:
        lines.append(f"created    {counted(report.created, 'partition')} ahead")
    for result in ("dropped", "expired", "contended", "missing", "pending"):
        lines += [_line(outcome) for outcome in report.partitions if outcome.result == result]
    kept = [outcome for outcome in report.partitions if outcome.result == "kept"]
    lines.append(f"kept       {counted(len(kept), 'partition')}, {_size(sum(outcome.bytes for outcome in kept))}")
    lines += [f"removed    {count} {what}" for what, count in report.rows.items()]
    if ttl is None:
        lines.append("No --ttl was given, so nothing is dropped.")
    if report.dry_run:
        lines.append("Only a rehearsal: nothing was changed.")
    elif any(outcome.result == "contended" for outcome in report.partitions):
        lines.append("Somebody reads what is contended, in a transaction that goes on; the next pass will drop it.")
    if any(outcome.result == "pending" for outcome in report.partitions):
        lines.append("Somebody else detaches what is pending; until that has finished, nothing else can be detached.")
    lines.append(f"{report.seconds:.1f} s")
    return lines


def _line(outcome: Outcome) -> str:
    bounds = f"{_moment(outcome.lower)} to {_moment(outcome.upper)}" if outcome.upper else "detached by an earlier pass"
    archived = f", archived in {outcome.archived}" if outcome.archived else ""
    return f"{outcome.result:<10} {outcome.name} ({bounds}, {_size(outcome.bytes)}){archived}"


def _moment(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M}" if moment else ""


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _plain(report: Report) -> dict[str, Any]:
    plain = dataclasses.asdict(report) | {"contended": report.contended}
    for outcome in plain["partitions"]:
        for bound in ("lower", "upper"):
            outcome[bound] = outcome[bound].isoformat() if outcome[bound] else None
    return plain
