"""How a command says what it found, and what went wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import typer

from ..errors import Error
from . import terminal

if TYPE_CHECKING:
    from ..doctor import Check

__all__ = ["explain", "print_checks", "tell_verdict"]

INDENT: Final = 20


def explain(error: Error) -> str:
    """One sentence; and before it the notes, which are tracebacks of the user's own code."""
    return "".join(f"{note}\n" for note in getattr(error, "__notes__", ())) + f"mcp-pg-events: {error}"


def tell_verdict(checks: Sequence[Check], *, as_json: bool) -> None:
    """The checks, and their exit code: 1 where one fails, also where nobody reads the rest."""
    failed = any(check.status == "fail" for check in checks)
    try:
        if as_json:
            print(json.dumps({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]}))
        else:
            print_checks(checks)
        sys.stdout.flush()
    except BrokenPipeError:
        terminal.abandon()
    if failed:
        raise typer.Exit(1)


def print_checks(checks: Sequence[Check], *, err: bool = False) -> None:
    """Each check with what was found and what to do, as wide as the terminal."""
    width = shutil.get_terminal_size((80, 24)).columns
    for check in checks:
        print(_lines(check, width), file=sys.stderr if err else sys.stdout)


def _lines(check: Check, width: int) -> str:
    head = f"{check.status:<5} {check.name:<13} "
    advice = [f"-> {check.advice}"] if check.advice else []
    return "\n".join(
        textwrap.fill(
            text,
            max(width, INDENT + 20),
            initial_indent=head if place == 0 else " " * INDENT,
            subsequent_indent=" " * INDENT,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for place, text in enumerate([check.found, *advice])
    )
