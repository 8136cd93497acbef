"""Commands in this process, since a new one spends seconds of a test on importing.

    ran = mcp_pg_events("migrate", "--dsn", dsn)
    assert (ran.code, ran.err) == (0, "")

Nothing of this process's own settings reaches a command, and nothing of what it sets stays.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import alembic.config

from mcp_pg_events.cli import main

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str


def without_settings(**extra: str) -> dict[str, str]:
    """The environment less what this package reads, for a process or a command."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MCP_PG_EVENTS_")} | extra


def mcp_pg_events(*arguments: str, directory: Path = ROOT, **environment: str) -> Ran:
    """`mcp-pg-events ARGUMENTS...` in `directory`, for a command that ends by itself."""
    return _run(["mcp-pg-events", *arguments], main, directory, environment)


def alembic_in_checkout(*arguments: str, **environment: str) -> Ran:
    """`alembic ARGUMENTS...` where pyproject.toml is."""
    return _run(["alembic", *arguments], alembic.config.main, ROOT, environment)


def _run(command: list[str], run: Callable[[], object], directory: Path, environment: dict[str, str]) -> Ran:
    code: object = 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", command))
        stack.enter_context(mock.patch.object(sys, "path", [str(directory), *sys.path]))
        stack.enter_context(mock.patch.dict(os.environ, without_settings(**environment), clear=True))
        stack.enter_context(contextlib.chdir(directory))
        stack.callback(signal.signal, signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        stack.callback(_forget_modules, directory)
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            run()
        except SystemExit as end:
            code = end.code or 0
    return Ran(code if isinstance(code, int) else 1, out.getvalue(), err.getvalue())


def _forget_modules(directory: Path) -> None:
    """The next test may have other modules of the same names."""
    if directory != ROOT:
        for name, module in list(sys.modules.items()):
            if (file := getattr(module, "__file__", None)) is not None and Path(file).is_relative_to(directory):
                del sys.modules[name]
