"""What `proxy` runs in each worker: an app before a program on stdio, or before an upstream over HTTP.

The command makes a plan, which travels in the environment, since uvicorn starts workers by an import string. Next:
`proxy/stdio.py`, `proxy/http.py`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

from ..errors import ConfigurationError, Error

if TYPE_CHECKING:
    from .application import Application

__all__ = ["FACTORY", "ProgramPlan", "ProxyPlan", "UpstreamPlan", "application", "proxy_extra", "variables"]

VARIABLE = "MCP_PG_EVENTS_PROXY"
FACTORY = "mcp_pg_events.cli.proxied:application"

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProxyPlan(ABC):
    """Everything a worker process has to know, whatever it stands before."""

    kind: ClassVar[str]

    dsn: str = dataclasses.field(repr=False)
    listen_dsn: str | None = dataclasses.field(repr=False)
    schema: str
    host: str
    path: str
    live_path: str | None
    ready_path: str | None
    idle_timeout: float | None
    embedded_home: str | None = None

    @property
    @abstractmethod
    def shown(self) -> str:
        """What is served, for people."""

    @abstractmethod
    def app(self) -> Application:
        """Raises ConfigurationError for what cannot work."""

    def publish(self) -> None:
        """Leave it to the workers."""
        os.environ[VARIABLE] = json.dumps([self.kind, dataclasses.asdict(self)])


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProgramPlan(ProxyPlan):
    """A program on stdio."""

    kind = "program"

    command: list[str]
    env: dict[str, str] = dataclasses.field(repr=False)
    max_processes: int
    start_timeout: float

    @property
    def shown(self) -> str:
        return shlex.quote(self.command[0])

    def app(self) -> Application:
        from ..proxy.stdio import loopback_security, stdio_app

        return stdio_app(
            self.command,
            self.dsn,
            path=self.path,
            live_path=self.live_path,
            ready_path=self.ready_path,
            env=self.env,
            max_processes=self.max_processes,
            idle_timeout=self.idle_timeout,
            start_timeout=self.start_timeout,
            security=loopback_security() if self.host in _LOOPBACK else None,
            listen_dsn=self.listen_dsn,
            schema=self.schema,
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamPlan(ProxyPlan):
    """A server that speaks Streamable HTTP."""

    kind = "upstream"

    upstream: str = dataclasses.field(repr=False)
    verify: bool
    ca_file: str | None
    cors_origins: list[str]
    upstream_timeout: float
    credential_lifetime: float
    max_message_size: int

    @property
    def shown(self) -> str:
        return self.upstream.partition("?")[0]

    def app(self) -> Application:
        with proxy_extra():
            from ..proxy.http import proxy_app
        from ..proxy.stdio import loopback_security

        return proxy_app(
            self.upstream,
            self.dsn,
            path=self.path,
            live_path=self.live_path,
            ready_path=self.ready_path,
            verify=self.verify,
            ca_file=self.ca_file,
            cors_origins=self.cors_origins,
            upstream_timeout=self.upstream_timeout,
            credential_lifetime=self.credential_lifetime,
            max_message_size=self.max_message_size,
            idle_timeout=self.idle_timeout,
            security=loopback_security() if self.host in _LOOPBACK else None,
            listen_dsn=self.listen_dsn,
            schema=self.schema,
        )


def application() -> Application:
    """The app of this worker process (uvicorn's factory), from the plan in the environment."""
    from uvicorn.config import STARTUP_FAILURE

    from .application import end_with_the_command, using_embedded
    from .report import explain

    threading.Thread(target=end_with_the_command, daemon=True).start()
    kind, fields = json.loads(os.environ[VARIABLE])
    plan: ProxyPlan = ProgramPlan(**fields) if kind == ProgramPlan.kind else UpstreamPlan(**fields)
    try:
        app = plan.app()
        return app if plan.embedded_home is None else using_embedded(app, plan.embedded_home)
    except Error as error:
        # Any other way to end, and uvicorn starts the worker again, for ever.
        print(explain(error), file=sys.stderr)
        sys.exit(STARTUP_FAILURE)


@contextmanager
def proxy_extra() -> Iterator[None]:
    """Around an import of what speaks to an upstream: without the extra, raise ConfigurationError."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "aiohttp":
            raise
        raise ConfigurationError(
            "An upstream over HTTP needs the `proxy` extra: pip install 'mcp-pg-events[proxy]'."
        ) from None


def variables(given: list[str]) -> dict[str, str]:
    """What `--env` gives a program. Raises ConfigurationError."""
    found = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals and name not in os.environ:
            raise ConfigurationError(f"There is no variable {name!r} in this environment; give --env {name}=VALUE.")
        if not name:
            raise ConfigurationError(f"{each!r} is no NAME or NAME=VALUE.")
        found[name] = value if equals else os.environ[name]
    return found
