"""What both kinds of proxy check of their options."""

from __future__ import annotations

from ..errors import ConfigurationError

__all__ = ["check_name", "check_paths", "check_seconds", "check_sizes"]


def check_seconds(**values: float | None) -> None:
    """Raise `ConfigurationError` for a time that cannot be; None is for ever."""
    for option, value in values.items():
        if value is not None and not 0 < value < 1e9:
            raise ConfigurationError(f"{option} has to be a positive number of seconds")


def check_sizes(**values: int) -> None:
    """Raise `ConfigurationError` for less than one of anything."""
    for option, value in values.items():
        if value < 1:
            raise ConfigurationError(f"{option} has to be 1 or more")


def check_name(name: str | None) -> None:
    """Raise `ConfigurationError` for what PostgreSQL cannot keep, or nobody can read."""
    if name is not None and (not name or "\0" in name):
        raise ConfigurationError("name has to be a string of at least one character, without NUL")


def check_paths(path: str, live_path: str | None, ready_path: str | None) -> None:
    """Raise `ConfigurationError` for an endpoint's path that cannot be, or that another route has."""
    if not path.startswith("/"):
        raise ConfigurationError(f"The path {path!r} has to begin with a slash")
    if path in (live_path, ready_path):
        raise ConfigurationError(f"The path {path!r} is the endpoint's; live_path and ready_path need others")
