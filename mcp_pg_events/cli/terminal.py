"""How the operator's commands write: lines that are safe on a terminal, and that a pipe may stop taking.

Next: stdout.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import UTC, datetime, timedelta
from types import FrameType
from typing import Any

import typer

__all__ = ["abandon", "age", "as_json", "moment", "output", "pause", "size", "table"]

INTERRUPTED = 130


@contextmanager
def output() -> Iterator[None]:
    """Around what writes to stdout: a reader that has had enough is no failure, and Ctrl-C is no accident."""
    if hasattr(sys.stdout, "reconfigure"):
        # A terminal of another encoding gets escapes for what it cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with _interruptible():
            yield
            sys.stdout.flush()
    except BrokenPipeError:
        abandon()
        raise typer.Exit from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def abandon() -> None:
    """Nobody reads stdout any more, which Python flushes once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


_interrupts: list[int] = []


@contextmanager
def _interruptible() -> Iterator[None]:
    """Remember Ctrl-C: Python drops the exception where it meets a callback or a finaliser, and nobody would stop."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        _interrupts.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _interrupts.clear()


def pause(seconds: float) -> None:
    """Wait. Raises BrokenPipeError where nobody reads stdout any more, which a write would only find out later."""
    if _interrupts:
        raise KeyboardInterrupt
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        time.sleep(seconds)
        return
    watch = select.poll()
    watch.register(descriptor, 0)  # which an error or a hang-up is reported of all the same
    if watch.poll(seconds * 1000):
        raise BrokenPipeError


def as_json(value: Any) -> str:
    """A dataclass or a dict as JSON on one line, in ASCII: times as ISO 8601, spans in seconds."""
    return json.dumps(asdict(value) if is_dataclass(value) and not isinstance(value, type) else value, default=_plain)


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def moment(value: datetime | None) -> str:
    """A time for people, in UTC; empty for None."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if value is not None else ""


def age(seconds: float) -> str:
    """A span for people: `42s`, `17m`, `5h`, `12d`."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def size(count: float) -> str:
    """Bytes for people: `17 B`, `3.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be, of cells that are fit for a terminal already."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
