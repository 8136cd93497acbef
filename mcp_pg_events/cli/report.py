"""How a command says what it found, and what went wrong."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..errors import Error

if TYPE_CHECKING:
    from ..doctor import Check

__all__ = ["explain", "print_checks"]

INDENT: Final = 20


def explain(error: Error) -> str:
    """One sentence; and before it the notes, which are tracebacks of the user's own code."""
    return "".join(f"{note}\n" for note in getattr(error, "__notes__", ())) + f"mcp-pg-events: {error}"


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
