"""`mcp-pg-events stats`: how much there is, as tables and a chart. Next: `mcp_pg_events.operator.stats`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from . import terminal
from .options import Dsn, Json, Schema
from .sessions import desk

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..operator.stats import Partition, Stats

__all__ = ["stats"]

BAR = 24
SHOWN = 40
"""Partitions in the table; `--json` has all of them."""


def stats(dsn: Dsn = None, schema: Schema = None, as_json: Json = False) -> None:
    """Show how much there is: events by partition, with sizes and rates, sessions, running calls, readers and workers.

    Small tables are counted. Of large ones there is PostgreSQL's own estimate, with a ~ before it.
    """
    from ..operator import stats as counting

    with desk(dsn, schema, "stats") as opened:
        found = counting.collect(opened)
        if as_json:
            print(terminal.as_json(found))
        else:
            _show(found)


def _show(found: Stats) -> None:
    from rich.console import Console

    from ..operator.text import plain, shortened

    # A pipe has no width, and gets whole lines.
    width = None if sys.stdout.isatty() else 120
    console = Console(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)
    _partitions(console, found)
    sessions = found.sessions
    facts = _table("", "", "")
    facts.add_row(
        "Sessions",
        f"{_number(sessions.live, sessions.live_estimated)} live",
        f"{_number(sessions.ended, sessions.ended_estimated)} ended",
    )
    facts.add_row(
        "Running calls",
        f"{found.calls:,}",
        ", ".join(f"{each.calls:,} {shortened(each.method or 'unknown', 40)}" for each in found.methods[:5]),
    )
    oldest = max((each.oldest for each in found.methods), default=None)
    if oldest is not None:
        facts.add_row("", "", f"the oldest for {terminal.age(oldest)}")
    facts.add_row("Readers", f"{found.readers:,}", f"{found.standalone_readers:,} of standalone streams")
    for each in found.tables:
        facts.add_row(
            f"Table {each.name}",
            terminal.size(each.bytes),
            f"{_number(each.rows, each.estimated)} {'row' if each.rows == 1 else 'rows'}",
        )
    facts.show_header = False
    console.print(facts)
    if not found.workers:
        console.print("No worker runs.")
        return
    table = _table("Worker", "Host", "Pid", "Started (UTC)", "Last sign", "Calls", "Readers")
    for worker in found.workers:
        sign = f"{terminal.age(worker.silent)} ago" + ("" if worker.alive else ", no lock")
        table.add_row(
            str(worker.number),
            plain(worker.host),
            str(worker.pid),
            terminal.moment(worker.started_at),
            sign,
            f"{worker.calls:,}",
            f"{worker.readers:,}",
        )
    console.print(table)


def _partitions(console: Console, found: Stats) -> None:
    from rich.text import Text

    from ..operator.text import counted, plain

    if not found.partitions:
        console.print("There are no partitions.")
        return
    mark = "#" if console.encoding.lower().replace("-", "") not in ("utf8", "utf16") else "█"
    most = max(partition.events for partition in found.partitions) or 1
    table = _table("Partition", "From (UTC)", "Events", "Size", "Events/s", "", right=(2, 3, 4))
    for partition in found.partitions[-SHOWN:]:
        table.add_row(
            plain(partition.name),
            f"{terminal.moment(partition.lower)[:16]}",
            _number(partition.events, partition.estimated),
            terminal.size(partition.bytes),
            _rate(partition),
            Text(mark * -(-BAR * partition.events // most), style="cyan"),
        )
    table.add_section()
    table.add_row(
        counted(len(found.partitions), "partition"),
        "",
        _number(found.events, found.events_estimated),
        terminal.size(found.bytes),
        "",
        "",
    )
    console.print(table)
    if len(found.partitions) > SHOWN:
        console.print(f"The newest {SHOWN} are shown; --json has all.")


def _table(*head: str, right: tuple[int, ...] = ()) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(head):
        table.add_column(name, justify="right" if place in right else "left", overflow="fold")
    return table


def _number(count: int, estimated: bool) -> str:
    return f"{'~' if estimated else ''}{count:,}"


def _rate(partition: Partition) -> str:
    if partition.going:
        return "going"
    return f"{partition.rate:,.2f}" if partition.rate is not None else "to come"
