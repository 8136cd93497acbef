"""`mcp-pg-events demo`: see a call survive its connection. Next: `mcp_pg_events.demo`."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..settings import Settings
from . import terminal
from .options import Dsn

if TYPE_CHECKING:
    from rich.console import Console

    from ..demo.run import Verdict

__all__ = ["demo"]

_T = TypeVar("_T")


def demo(
    dsn: Dsn = None,
    seconds: Annotated[float, typer.Option(min=1, max=600, help="How long the call lasts.")] = 6.0,
    events: Annotated[int, typer.Option(min=1, max=100_000, help="Progress events that the call sends.")] = 60,
    cuts: Annotated[int, typer.Option(min=0, max=1000, help="How often its connection is cut.")] = 5,
    seed: Annotated[
        int | None, typer.Option(help="Of the moments at which it is cut.", show_default="a random one, printed")
    ] = None,
) -> None:
    """Watch one tool call survive a connection that keeps breaking.

    Two worker processes stand behind a plain round robin: no request of the client goes to the same one as the last.
    The SDK's own client, in a third process, makes one long call with progress; its connection is cut several times,
    and resumed on whichever worker comes. At the end the events are counted: exit code 0 if each came exactly once and
    in order, 1 if one was lost or doubled.

    Without a DSN, and with the `embedded` extra, it runs a PostgreSQL of its own in a temporary directory. With one it
    makes a schema of its own in that database, and removes it afterwards; nothing else is touched.

    Examples:

        mcp-pg-events demo

        mcp-pg-events demo --events 2000 --seconds 20 --cuts 40 --seed 7

        mcp-pg-events demo --dsn postgresql://localhost/scratch
    """
    from ..demo.run import Options, run

    seed = random.randrange(1_000_000) if seed is None else seed
    hang_ups: list[Callable[[], None]] = []
    console = _console(hang_ups)
    started = time.monotonic()
    database = _database(Settings.given(dsn=dsn).database, console)
    options = Options(events=events, seconds=seconds, cuts=cuts, seed=seed)
    try:
        verdict = asyncio.run(_interruptible(run(options, database, console), hang_ups))
    except asyncio.CancelledError:
        if console.quiet:
            raise typer.Exit from None
        console.print("Interrupted.")
        raise typer.Exit(130) from None
    _print_verdict(console, verdict, seed, time.monotonic() - started)
    if not verdict.passed:
        raise typer.Exit(1)


def _console(hang_ups: list[Callable[[], None]]) -> Console:
    """What is written to, and does the `hang_ups` where nobody reads it any more."""
    from rich.console import Console

    class Watched(Console):
        def on_broken_pipe(self) -> None:
            # Not by an exception, as Rich does it: this may be in any task.
            self.quiet = True
            terminal.abandon()
            for hang_up in hang_ups:
                hang_up()

    return Watched(highlight=False)


@contextlib.contextmanager
def _database(dsn: str | None, console: Console) -> Iterator[tuple[str, str]]:
    """A DSN and a migrated schema in it that is nobody else's, both gone afterwards if they were made here."""
    if dsn is None:
        from ..embedded import embedded_postgres, require

        require()
        with tempfile.TemporaryDirectory(prefix="mcp-pg-events-", ignore_cleanup_errors=True) as home:
            console.print(f"No DSN given: starting a PostgreSQL in {home}.", soft_wrap=True)
            with embedded_postgres(home) as dsn:
                yield dsn, "mcp_events"
        return
    import psycopg
    from psycopg import sql

    from .. import database, migrate

    schema = f"mcp_events_demo_{secrets.token_hex(4)}"
    console.print(f"Using the schema {schema} in the given database; it is removed at the end.", soft_wrap=True)
    migrate.upgrade(dsn, schema=schema)
    try:
        yield dsn, schema
    finally:
        with contextlib.suppress(psycopg.Error), psycopg.connect(database.normalise_dsn(dsn)) as connection:
            connection.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))


def _print_verdict(console: Console, verdict: Verdict, seed: int, took: float) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    rows = [
        (verdict.expected, "events were sent"),
        (len(verdict.received), "reached the client"),
        (verdict.lost, "were lost"),
        (verdict.doubled, "came twice"),
        (verdict.misplaced, "came out of order"),
        (verdict.cuts, f"times the connection was cut, {verdict.half_open} of them where the worker could not tell"),
        (verdict.resumed_elsewhere, "times it was resumed on the worker that did not run the call"),
        (verdict.resumed_here, "times on the one that did"),
    ]
    for number, what in rows:
        table.add_row(str(number), what)
    console.print()
    console.print(table)
    console.print()
    if verdict.passed:
        outcome = "[bold green]Every event arrived exactly once and in order.[/]"
    elif verdict.result is None or verdict.failed:
        outcome = f"[bold red]The call failed[/]: {escape(verdict.result or 'it did not end')}"
    else:
        outcome = "[bold red]Events were lost, doubled or out of order.[/]"
    for line in verdict.worker_log:
        console.print(line, style="dim", markup=False, soft_wrap=True)
    console.print(f"{outcome} [dim]({took:.1f} s, --seed {seed})[/]", soft_wrap=True)


async def _interruptible(work: Coroutine[Any, Any, _T], hang_ups: list[Callable[[], None]]) -> _T:
    """Await `work`; Ctrl-C, SIGTERM and a hang-up cancel it once, so that it ends its processes and its database on the
    way out.

    Further signals change nothing: an exception in the middle of that would leave something behind.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    signalled = False

    def cancel() -> None:
        nonlocal signalled
        if not signalled:
            signalled = True
            task.cancel()

    def hang_up() -> None:
        loop.call_soon_threadsafe(cancel)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, cancel)
    hang_ups.append(hang_up)
    try:
        return await work
    finally:
        hang_ups.clear()
