"""uvicorn, as the commands run it: on a socket that was bound first, in this process or in several.

Next: the app that was made, or that each worker process makes from what the command left in its environment.
"""

from __future__ import annotations

import contextlib
import copy
import os
import socket
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.config import LOGGING_CONFIG, STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from ..errors import ConfigurationError, Error
from .options import LogLevel

if TYPE_CHECKING:
    from .application import Application

__all__ = ["exit_cleanly", "listen", "run", "shown"]

# How long connections may take to end after SIGTERM, in seconds; an SSE stream would otherwise hold a worker for ever.
_GRACE = 10

# How long a worker may leave uvicorn's supervisor without an answer before it is killed, in seconds. One that starts
# answers nothing yet, and many that start at once on a busy machine take longer than uvicorn's own 5 seconds.
_HEALTH_CHECK = 15


def run(
    app: Application,
    factory: str,
    listener: socket.socket,
    workers: int,
    log_level: LogLevel,
    *,
    access_log: bool = True,
) -> None:
    """Serve until a signal: `app` here, or what `factory` (an import string) makes in each of several workers.

    The access log has the URL of each request, with its query.

    Raises:
        Error: a worker failed to start.
    """
    started = (
        _run_workers(factory, listener, workers, log_level, access_log)
        if workers > 1
        else _run_here(app, listener, log_level, access_log)
    )
    if not started:
        raise Error("A worker could not start; its log is above.")


def _run_workers(factory: str, listener: socket.socket, workers: int, log_level: LogLevel, access_log: bool) -> bool:
    config = _config(
        factory,
        log_level,
        workers=workers,
        factory=True,
        timeout_worker_healthcheck=_HEALTH_CHECK,
        access_log=access_log,
    )
    supervisor = Multiprocess(config, sockets=[listener])
    supervisor.run()
    return all(process.exitcode != STARTUP_FAILURE for process in supervisor.processes)


def _run_here(app: Application, listener: socket.socket, log_level: LogLevel, access_log: bool) -> bool:
    server = uvicorn.Server(_config(app, log_level, access_log=access_log))
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    except SystemExit as end:  # uvicorn raises the signal that ended it again, once it is done
        return end.code != STARTUP_FAILURE
    return server.started


def _config(app: Any, level: LogLevel, **options: Any) -> uvicorn.Config:
    log_config = copy.deepcopy(LOGGING_CONFIG)
    for name in ("mcp_pg_events", "mcp"):
        log_config["loggers"][name] = {"handlers": ["default"], "level": level.upper(), "propagate": False}
    return uvicorn.Config(
        app, log_level=level, log_config=log_config, timeout_graceful_shutdown=_GRACE, lifespan="on", **options
    )


def exit_cleanly(number: int, frame: FrameType | None) -> None:
    """A handler of SIGTERM: what is to be left in order is."""
    raise SystemExit(0)


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """The socket that all workers accept from, bound first so that a taken port says so at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror:
        raise ConfigurationError(f"The host {host!r} is no address of this machine.") from None
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            reason = os.strerror(error.errno).lower() if error.errno else str(error)
            raise ConfigurationError(
                f"Cannot listen on {host} port {port} ({reason}); choose another with --host and --port."
            ) from None
        yield listener


def shown(listener: socket.socket) -> str:
    """The address that a socket listens on, for people."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
