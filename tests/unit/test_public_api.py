"""What may be imported, what it is called, and what importing it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import mcp_pg_events
from mcp_pg_events import errors

HEAVY = ["alembic", "sqlalchemy", "typer", "fastmcp", "platformdirs", "pydantic_settings", "mcp_pg_events.cli"]


def test_the_public_api_is_this() -> None:
    assert sorted(mcp_pg_events.__all__) == ["Health", "PostgresStore", "durable", "errors", "health_routes"]


@pytest.mark.parametrize("name", mcp_pg_events.__all__)
def test_each_public_name_says_where_it_lives_and_what_it_does(name: str) -> None:
    value = getattr(mcp_pg_events, name)
    home = value.__name__ if inspect.ismodule(value) else value.__module__
    assert home.split(".")[0] == "mcp_pg_events"
    assert inspect.getdoc(value), f"{name} has no docstring"


def test_public_methods_and_properties_have_a_docstring() -> None:
    members = inspect.getmembers(
        mcp_pg_events.PostgresStore, lambda value: callable(value) or isinstance(value, property)
    )
    public = [(name, value) for name, value in members if not name.startswith("_")]
    assert {"drain", "for_session", "store_event", "replay_events_after"} <= {name for name, _ in public}
    for name, value in public:
        # One that comes from the SDK's base class would be about something else.
        assert value.__doc__ and value.__doc__ is not getattr(mcp_pg_events.PostgresStore.__base__, name, None).__doc__


@pytest.mark.parametrize("name", errors.__all__)
def test_each_error_is_one_sentence_of_its_own(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.Error)
    assert error.__module__ == "mcp_pg_events.errors"
    assert "\n" not in error.__doc__ and error.__doc__.endswith(".")
    assert str(error()) == error.__doc__
    assert str(error("Said otherwise.")) == "Said otherwise."


def test_all_errors_are_listed() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert defined == set(errors.__all__)


def test_importing_it_loads_neither_migrations_nor_the_command_line() -> None:
    code = f"import sys, mcp_pg_events; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")
